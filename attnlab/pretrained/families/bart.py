"""BART, mBART, Marian and Pegasus: encoder-decoders with layer norms and biases."""

from typing import Any

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import DecoderConfig, EncoderConfig, Learned, Seq2SeqConfig, Sinusoidal
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def bart(hf: HFConfig) -> Seq2SeqConfig:
    """BART: post-norm, learned positions (Lewis et al. 2020, arXiv 1910.13461, section 2.1)."""
    return _config(hf, placement="post", positions=_learned(hf), embedding_norm=True)


def mbart(hf: HFConfig) -> Seq2SeqConfig:
    """mBART: pre-norm, learned positions (Liu et al. 2020, arXiv 2001.08210, section 2.2)."""
    return _config(hf, placement="pre", positions=_learned(hf), embedding_norm=True)


def marian(hf: HFConfig) -> Seq2SeqConfig:
    """Marian: the 2017 Transformer with sines and cosines in separate halves (arXiv 1804.00344)."""
    shared = hf.get("share_encoder_decoder_embeddings", True)
    return _config(hf, shared_embedding=shared, placement="post", positions=Sinusoidal(halves=True))


def pegasus(hf: HFConfig) -> Seq2SeqConfig:
    """Pegasus: pre-norm, sinusoidal positions (Zhang et al. 2020, arXiv 1912.08777)."""
    return _config(hf, placement="pre", positions=Sinusoidal(halves=True))


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of all these families for an encoder-decoder."""
    encoder = config.encoder if isinstance(config.encoder, EncoderConfig) else EncoderConfig()
    decoder = config.decoder
    positions = decoder.positions.length - 2 if isinstance(decoder.positions, Learned) else length
    halves = {
        f"{half}_{name}": value
        for half, part in (("encoder", encoder), ("decoder", decoder))
        for name, value in {
            "layers": part.depth,
            "attention_heads": part.attention.heads,
            "ffn_dim": part.feed_forward.hidden(part.width),
        }.items()
    }
    return halves | {
        "d_model": decoder.width,
        "activation_function": HF_ACTIVATION_NAMES.get(decoder.feed_forward.activation),
        "max_position_embeddings": positions,
        "scale_embedding": decoder.scale_embedding,
        "share_encoder_decoder_embeddings": config.shared_embedding,
        "vocab_size": encoder.vocab_size,
        **({} if config.shared_embedding else {"decoder_vocab_size": decoder.vocab_size}),
        "tie_word_embeddings": decoder.tied,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
        "forced_bos_token_id": next(iter(config.generation.forced_decoder_ids), None),
        "forced_eos_token_id": None,
    }


def _learned(hf: HFConfig) -> Learned:
    return Learned(hf["max_position_embeddings"] + 2, offset=2)


def _config(hf: HFConfig, shared_embedding: bool = True, **changes: Any) -> Seq2SeqConfig:
    hf.require("tie_word_embeddings", True)
    for half in ("encoder", "decoder"):
        hf.require(f"{half}_layerdrop", 0.0)

    def half_fields(half: str) -> dict[str, Any]:
        return changes | {
            "depth": hf[f"{half}_layers"],
            "width": hf["d_model"],
            "attention": AttentionConfig(
                hf[f"{half}_attention_heads"], bias=True, dropout=hf.get("attention_dropout", 0.0)
            ),
            "feed_forward": MLPConfig(hf[f"{half}_ffn_dim"], hf.activation("activation_function")),
            "norm": LayerNormConfig(),
            "scale_embedding": hf.get("scale_embedding", False),
            "vocab_size": hf["vocab_size"],
            "dropout": hf.get("dropout", 0.0),
        }

    decoder = half_fields("decoder") | {"vocab_size": hf.get("decoder_vocab_size", hf["vocab_size"])}
    return Seq2SeqConfig(
        EncoderConfig(**half_fields("encoder")),
        DecoderConfig(readout_bias=True, **decoder),
        shared_embedding=shared_embedding,
        generation=hf.generation_defaults(hf.get("decoder_start_token_id")),
    )


def _tensors(config: Seq2SeqConfig | None = None) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings; separate embedding tables have other names than a shared one."""
    shared = config is None or config.shared_embedding
    return (
        TensorMapping(
            "decoder/embedding/table", f"model.{'shared' if shared else 'decoder.embed_tokens'}.weight"
        ),
        TensorMapping("encoder/embedding/table", "model.encoder.embed_tokens.weight"),
        TensorMapping("decoder/readout/table", "lm_head.weight"),
        TensorMapping("decoder/readout_bias/bias", "final_logits_bias", "1 v -> v"),
        *half("encoder", "model.encoder"),
        *half("decoder", "model.decoder"),
    )


def half(param: str, hf_name: str) -> list[TensorMapping]:
    """Return the mappings of an encoder or a decoder without its token embeddings."""
    rows = [
        TensorMapping(f"{param}/position_embedding/table", f"{hf_name}.embed_positions.weight"),
        *norm(f"{param}/embedding_norm", f"{hf_name}.layernorm_embedding"),
    ]
    layer, hf_layer = f"{param}/layers/{{layer}}", f"{hf_name}.layers.{{layer}}"
    for branch, attention in {"attention": "self_attn", "cross_attention": "encoder_attn"}.items():
        rows += norm(f"{layer}/{branch}_norm", f"{hf_layer}.{attention}_layer_norm")
        for name in ("query", "key", "value"):
            rows += linear(
                f"{layer}/{branch}/{name}", f"{hf_layer}.{attention}.{name[0]}_proj", "(h d) e -> e h d"
            )
        rows.append(
            TensorMapping(
                f"{layer}/{branch}/out/kernel", f"{hf_layer}.{attention}.out_proj.weight", "e (h d) -> h d e"
            )
        )
        rows.append(TensorMapping(f"{layer}/{branch}/out/bias", f"{hf_layer}.{attention}.out_proj.bias"))
    rows += norm(f"{layer}/feed_forward_norm", f"{hf_layer}.final_layer_norm")
    rows += linear(f"{layer}/feed_forward/up", f"{hf_layer}.fc1")
    rows += linear(f"{layer}/feed_forward/down", f"{hf_layer}.fc2")
    return [*rows, *norm(f"{param}/norm", f"{hf_name}.layer_norm")]


def _family(config, architecture: str, *ignored: str) -> Family:
    table = "decoder/embedding/table"
    copies = (f"model.{half}.embed_tokens.weight" for half in ("encoder", "decoder"))
    return Family(
        config,
        _tensors(),
        prefix="model.",
        architecture=architecture,
        fields=fields,
        ignored=(r"(model\.)?(en|de)coder\.version", *ignored),
        readout=TensorMapping(table, "lm_head.weight"),
        copies=tuple(TensorMapping(table, name) for name in copies),
        tie_fields=(),
        config_class=Seq2SeqConfig,
        tensors_of=_tensors,
        optional_zero_tensors=("final_logits_bias",),
    )


SINUSOIDS = r"(model\.)?(en|de)coder\.embed_positions\.weight"
FAMILIES = {
    "bart": _family(bart, "BartForConditionalGeneration"),
    "mbart": _family(mbart, "MBartForConditionalGeneration"),
    "marian": _family(marian, "MarianMTModel", SINUSOIDS),
    "pegasus": _family(pegasus, "PegasusForConditionalGeneration", SINUSOIDS),
}
