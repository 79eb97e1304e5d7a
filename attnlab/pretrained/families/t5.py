"""T5 and mT5: encoder-decoders with a relative position bias."""

from typing import Any

from attnlab.layers import AttentionConfig, GatedMLPConfig, MLPConfig, RelativeBias, RMSNormConfig
from attnlab.models import DecoderConfig, EncoderConfig, Seq2SeqConfig
from attnlab.pretrained.families.base import Family
from attnlab.pretrained.hf_config import ACTIVATIONS, HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def t5(hf: HFConfig) -> Seq2SeqConfig:
    """T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1) and T5 1.1.

    T5 reads logits from the embedding table, with scaled decoder outputs. T5 1.1 has a separate
    output table without scaling. transformers 5 decides by the tensors whether there is one.
    """
    tied = hf.get("tie_word_embeddings", True)
    return _t5(hf, tied, hf.get("scale_decoder_outputs", tied))


def mt5(hf: HFConfig) -> Seq2SeqConfig:
    """mT5 (Xue et al. 2021, arXiv 2010.11934, section 3.2)."""
    return _t5(hf, tied=False, scaled=False)


def _t5(hf: HFConfig, tied: bool, scaled: bool) -> Seq2SeqConfig:
    half: dict[str, Any] = {
        "width": hf["d_model"],
        "attention": AttentionConfig(
            hf["num_heads"], head_dim=hf["d_kv"], scale=1.0, dropout=hf.get("dropout_rate", 0.0)
        ),
        "feed_forward": _feed_forward(hf),
        "norm": RMSNormConfig(hf["layer_norm_epsilon"]),
        "positions": RelativeBias(
            hf["relative_attention_num_buckets"], hf.get("relative_attention_max_distance", 128)
        ),
        "vocab_size": hf["vocab_size"],
        "dropout": hf.get("dropout_rate", 0.0),
    }
    depth = hf["num_layers"]
    return Seq2SeqConfig(
        EncoderConfig(depth=depth, **half),
        DecoderConfig(depth=hf.get("num_decoder_layers", depth), tied=tied, scale_readout=scaled, **half),
        shared_embedding=True,
        generation=hf.generation_defaults(hf.get("decoder_start_token_id", hf.get("pad_token_id", 0))),
    )


def _feed_forward(hf: HFConfig) -> MLPConfig | GatedMLPConfig:
    kind = hf["feed_forward_proj"]
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    if kind == "gated-gelu":
        name = "gelu_new"  # T5's "gated-gelu" means the tanh approximation
    hf.require("feed_forward_proj", *(f"{gate}{known}" for gate in ("", "gated-") for known in ACTIVATIONS))
    activation: Any = ACTIVATIONS[name]
    return (GatedMLPConfig if gated else MLPConfig)(hf["d_ff"], activation, bias=False)


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of both for an encoder-decoder."""
    del length
    encoder = config.encoder if isinstance(config.encoder, EncoderConfig) else EncoderConfig()
    decoder = config.decoder
    buckets = decoder.positions if isinstance(decoder.positions, RelativeBias) else RelativeBias()
    gate = "gated-" if isinstance(decoder.feed_forward, GatedMLPConfig) else ""
    return {
        "num_layers": encoder.depth,
        "num_decoder_layers": decoder.depth,
        "d_model": decoder.width,
        "num_heads": decoder.attention.heads,
        "d_kv": decoder.head_dim,
        "d_ff": decoder.feed_forward.hidden(decoder.width),
        "feed_forward_proj": f"{gate}{HF_ACTIVATION_NAMES.get(decoder.feed_forward.activation)}",
        "layer_norm_epsilon": decoder.norm.epsilon,
        "relative_attention_num_buckets": buckets.buckets,
        "relative_attention_max_distance": buckets.max_distance,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": decoder.tied,
        "scale_decoder_outputs": decoder.scale_readout,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
    }


def _tensors(config: Seq2SeqConfig | None = None) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings; gated feed-forward layers have other names than plain ones."""
    gated = config is not None and isinstance(config.decoder.feed_forward, GatedMLPConfig)
    return (
        TensorMapping("decoder/embedding/table", "shared.weight"),
        *_half("encoder", ("attention", "feed_forward"), gated),
        *_half("decoder", ("attention", "cross_attention", "feed_forward"), gated),
        TensorMapping("decoder/readout/table", "lm_head.weight"),
    )


def _half(half: str, branches: tuple[str, ...], gated: bool) -> list[TensorMapping]:
    """Return the mappings of one half; the checkpoint numbers the branches of a layer."""
    first = f"{half}.block.0.layer.0.SelfAttention"
    rows = [TensorMapping(f"{half}/relative/table", f"{first}.relative_attention_bias.weight")]
    for number, branch in enumerate(branches):
        param, hf_name = f"{half}/layers/{{layer}}/{branch}", f"{half}.block.{{layer}}.layer.{number}"
        rows.append(TensorMapping(f"{param}_norm/scale", f"{hf_name}.layer_norm.weight"))
        if branch == "feed_forward":
            names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
            for name, tensor in names.items():
                rows.append(
                    TensorMapping(
                        f"{param}/{name}/kernel", f"{hf_name}.DenseReluDense.{tensor}.weight", "f e -> e f"
                    )
                )
            continue
        hf_name += ".SelfAttention" if branch == "attention" else ".EncDecAttention"
        for name in ("query", "key", "value"):
            rows.append(
                TensorMapping(f"{param}/{name}/kernel", f"{hf_name}.{name[0]}.weight", "(h d) e -> e h d")
            )
        rows.append(TensorMapping(f"{param}/out/kernel", f"{hf_name}.o.weight", "e (h d) -> h d e"))
    return [*rows, TensorMapping(f"{half}/norm/scale", f"{half}.final_layer_norm.weight")]


def _family(config, architecture: str) -> Family:
    table = "decoder/embedding/table"
    copies = (f"{half}.embed_tokens.weight" for half in ("encoder", "decoder"))
    return Family(
        config,
        _tensors(),
        prefix="",
        architecture=architecture,
        fields=fields,
        ignored=(r".*\.EncDecAttention\.relative_attention_bias\.weight",),
        readout=TensorMapping(table, "lm_head.weight"),
        copies=tuple(TensorMapping(table, name) for name in copies),
        always_tied=True,
        tie_fields=(),
        config_class=Seq2SeqConfig,
        tensors_of=_tensors,
    )


FAMILIES = {
    "t5": _family(t5, "T5ForConditionalGeneration"),
    "mt5": _family(mt5, "MT5ForConditionalGeneration"),
}
