"""T5 and mT5: encoder-decoders that know of order by a learned term of the scores."""

from typing import Any

from attnlab.layers import AttentionConfig, GatedMLPConfig, MLPConfig, RelativeBias, RMSNormConfig
from attnlab.models import DecoderConfig, EncoderConfig, Seq2SeqConfig
from attnlab.pretrained.families.base import Family
from attnlab.pretrained.hf_config import ACTIVATIONS, HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def t5(s: HFConfig) -> Seq2SeqConfig:
    """T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1), and T5 1.1, whose logits have their own table.

    Only the former scales what they are read from. Transformers writes the latter as scaling nothing.
    """
    return _t5(s, tied=s.get("scale_decoder_outputs", s.get("tie_word_embeddings", True)))


def mt5(s: HFConfig) -> Seq2SeqConfig:
    """mT5 (Xue et al. 2021, arXiv 2010.11934, section 3.2)."""
    return _t5(s, tied=False)


def _t5(s: HFConfig, tied: bool) -> Seq2SeqConfig:
    half: dict[str, Any] = {
        "width": s["d_model"],
        "attention": AttentionConfig(
            s["num_heads"], head_dim=s["d_kv"], scale=1.0, dropout=s.get("dropout_rate", 0.0)
        ),
        "feed_forward": _feed_forward(s),
        "norm": RMSNormConfig(s["layer_norm_epsilon"]),
        "positions": RelativeBias(
            s["relative_attention_num_buckets"], s.get("relative_attention_max_distance", 128)
        ),
        "vocab_size": s["vocab_size"],
        "dropout": s.get("dropout_rate", 0.0),
    }
    depth = s["num_layers"]
    return Seq2SeqConfig(
        EncoderConfig(depth=depth, **half),
        DecoderConfig(depth=s.get("num_decoder_layers", depth), tied=tied, scale_readout=tied, **half),
        shared_embedding=True,
        generation=s.generation_defaults(s.get("decoder_start_token_id", s.get("pad_token_id", 0))),
    )


def _feed_forward(s: HFConfig) -> MLPConfig | GatedMLPConfig:
    kind = s["feed_forward_proj"]
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    if kind == "gated-gelu":
        name = "gelu_new"  # which is what it has always meant
    s.require("feed_forward_proj", *(f"{gate}{known}" for gate in ("", "gated-") for known in ACTIVATIONS))
    activation: Any = ACTIVATIONS[name]
    return (GatedMLPConfig if gated else MLPConfig)(s["d_ff"], activation, bias=False)


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """What the `config.json` of both says of an encoder-decoder."""
    del length
    reads = config.encoder if isinstance(config.encoder, EncoderConfig) else EncoderConfig()
    d = config.decoder
    buckets = d.positions if isinstance(d.positions, RelativeBias) else RelativeBias()
    gate = "gated-" if isinstance(d.feed_forward, GatedMLPConfig) else ""
    return {
        "num_layers": reads.depth,
        "num_decoder_layers": d.depth,
        "d_model": d.width,
        "num_heads": d.attention.heads,
        "d_kv": d.head_dim,
        "d_ff": d.feed_forward.hidden(d.width),
        "feed_forward_proj": f"{gate}{HF_ACTIVATION_NAMES.get(d.feed_forward.activation)}",
        "layer_norm_epsilon": d.norm.epsilon,
        "relative_attention_num_buckets": buckets.buckets,
        "relative_attention_max_distance": buckets.max_distance,
        "vocab_size": d.vocab_size,
        "tie_word_embeddings": d.tied,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
    }


def _tensors(config: Seq2SeqConfig | None = None) -> tuple[TensorMapping, ...]:
    """The names of a model; of its feed-forward layers with a gate, they are others."""
    gated = config is not None and isinstance(config.decoder.feed_forward, GatedMLPConfig)
    return (
        TensorMapping("decoder/embedding/table", "shared.weight"),
        *_half("encoder", ("attention", "feed_forward"), gated),
        *_half("decoder", ("attention", "cross_attention", "feed_forward"), gated),
        TensorMapping("decoder/readout/table", "lm_head.weight"),
    )


def _half(half: str, branches: tuple[str, ...], gated: bool) -> list[TensorMapping]:
    """The rows of one half; the branches of its layers are numbered there."""
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


def _family(config, architecture: str, *ignored: str) -> Family:
    copies = (r"(en|de)coder\.embed_tokens\.weight", r".*\.EncDecAttention\.relative_attention_bias\.weight")
    return Family(
        config,
        _tensors(),
        prefix="",
        architecture=architecture,
        fields=fields,
        ignored=(*copies, *ignored),
        config_class=Seq2SeqConfig,
        tensors_of=_tensors,
    )


FAMILIES = {
    "t5": _family(t5, "T5ForConditionalGeneration"),
    "mt5": _family(mt5, "MT5ForConditionalGeneration"),
}
