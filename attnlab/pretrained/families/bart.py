"""BART and what has grown from it: encoder-decoders with layer norms and biases throughout."""

from typing import Any

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.models import DecoderConfig, EncoderConfig, Learned, Seq2SeqConfig, Sinusoidal
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def bart(s: HFConfig) -> Seq2SeqConfig:
    """BART: norms after branches, learned positions (Lewis et al. 2020, arXiv 1910.13461, section 2.1)."""
    return _config(s, placement="post", positions=_learned(s), embedding_norm=True)


def mbart(s: HFConfig) -> Seq2SeqConfig:
    """mBART: norms before branches, and after each half (Liu et al. 2020, arXiv 2001.08210, section 2.2)."""
    return _config(s, placement="pre", positions=_learned(s), embedding_norm=True)


def marian(s: HFConfig) -> Seq2SeqConfig:
    """Marian's Transformer: that of 2017, sines and cosines apart (arXiv 1804.00344)."""
    shared = s.get("share_encoder_decoder_embeddings", True)
    return _config(s, shared_embedding=shared, placement="post", positions=Sinusoidal(halves=True))


def pegasus(s: HFConfig) -> Seq2SeqConfig:
    """Pegasus: norms before branches, and after each half (Zhang et al. 2020, arXiv 1912.08777)."""
    return _config(s, placement="pre", positions=Sinusoidal(halves=True))


def fields(config: Seq2SeqConfig, length: int) -> dict[str, Any]:
    """What the `config.json` of all of them says of an encoder-decoder."""
    reads = config.encoder if isinstance(config.encoder, EncoderConfig) else EncoderConfig()
    d = config.decoder
    positions = d.positions.length - 2 if isinstance(d.positions, Learned) else length
    halves = {
        f"{half}_{name}": value
        for half, part in (("encoder", reads), ("decoder", d))
        for name, value in {
            "layers": part.depth,
            "attention_heads": part.attention.heads,
            "ffn_dim": part.feed_forward.hidden(part.width),
        }.items()
    }
    return halves | {
        "d_model": d.width,
        "activation_function": HF_ACTIVATION_NAMES.get(d.feed_forward.activation),
        "max_position_embeddings": positions,
        "scale_embedding": d.scale_embedding,
        "share_encoder_decoder_embeddings": config.shared_embedding,
        "vocab_size": reads.vocab_size,
        **({} if config.shared_embedding else {"decoder_vocab_size": d.vocab_size}),
        "tie_word_embeddings": d.tied,
        "decoder_start_token_id": config.generation.decoder_start_token_id,
        "forced_bos_token_id": next(iter(config.generation.forced_decoder_ids), None),
        "forced_eos_token_id": None,
    }


def _learned(s: HFConfig) -> Learned:
    return Learned(s["max_position_embeddings"] + 2, offset=2)


def _config(s: HFConfig, shared_embedding: bool = True, **changes: Any) -> Seq2SeqConfig:
    s.require("tie_word_embeddings", True)
    for half in ("encoder", "decoder"):
        s.require(f"{half}_layerdrop", 0.0)

    def of(half: str) -> dict[str, Any]:
        return changes | {
            "depth": s[f"{half}_layers"],
            "width": s["d_model"],
            "attention": AttentionConfig(
                s[f"{half}_attention_heads"], bias=True, dropout=s.get("attention_dropout", 0.0)
            ),
            "feed_forward": MLPConfig(s[f"{half}_ffn_dim"], s.activation("activation_function")),
            "norm": LayerNormConfig(),
            "scale_embedding": s.get("scale_embedding", False),
            "vocab_size": s["vocab_size"],
            "dropout": s.get("dropout", 0.0),
        }

    decoder = of("decoder") | {"vocab_size": s.get("decoder_vocab_size", s["vocab_size"])}
    return Seq2SeqConfig(
        EncoderConfig(**of("encoder")),
        DecoderConfig(readout_bias=True, **decoder),
        shared_embedding=shared_embedding,
        generation=s.generation_defaults(s.get("decoder_start_token_id")),
    )


def _tensors(config: Seq2SeqConfig | None = None) -> tuple[TensorMapping, ...]:
    """The names of a model; of one whose halves have tables apart, these are others."""
    shared = config is None or config.shared_embedding
    return (
        TensorMapping(
            "decoder/embedding/table", f"model.{'shared' if shared else 'decoder.embed_tokens'}.weight"
        ),
        TensorMapping("encoder/embedding/table", "model.encoder.embed_tokens.weight"),
        TensorMapping("decoder/readout_bias/bias", "final_logits_bias", "1 v -> v"),
        *half("encoder", "model.encoder"),
        *half("decoder", "model.decoder"),
    )


def half(param: str, hf_name: str) -> list[TensorMapping]:
    """The rows of an encoder or a decoder but for its table of tokens."""
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
    copies = (r"lm_head\.weight", r"model\.(en|de)coder\.embed_tokens\.weight", r"(en|de)coder\.version")
    bare = r"(en|de)coder\.embed_tokens\.weight"
    return Family(
        config,
        _tensors(),
        prefix="model.",
        architecture=architecture,
        fields=fields,
        ignored=(*copies, bare, *ignored),
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
