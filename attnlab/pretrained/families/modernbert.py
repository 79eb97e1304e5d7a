"""ModernBERT: an encoder with rotary positions, gated feed-forward layers and sliding layers in turn."""

from typing import Any

from attnlab.layers import AttentionConfig, Bidirectional, GatedMLPConfig, LayerNormConfig, Rotary
from attnlab.models import ClassifierConfig, DenseConfig, EncoderConfig, FirstToken, MeanOfTokens
from attnlab.pretrained.families.base import label_fields, linear, norm, size_fields
from attnlab.pretrained.families.encoders import classifier, family, head, masked_lm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

FULL, SLIDING = "full_attention", "sliding_attention"


def modernbert(s: HFConfig) -> EncoderConfig:
    """ModernBERT (Warner et al. 2024, arXiv 2412.13663, section 2.1)."""
    for name in ("attention_dropout", "embedding_dropout", "mlp_dropout"):
        s.require(name, 0.0)
    s.require("sparse_prediction", False)
    s.require("classifier_pooling", "cls", "mean")
    depth, every = s["num_hidden_layers"], s.get("global_attn_every_n_layers", 3)
    half = s.get("local_attention", 128) // 2
    kinds = {
        FULL: Bidirectional(),
        SLIDING: Bidirectional(half, half, positions=_rotary(s, SLIDING, "local_rope_theta", 10_000.0)),
    }
    dense = DenseConfig(s.activation("classifier_activation"), s.get("classifier_bias", False), norm=True)
    return EncoderConfig(
        depth=depth,
        width=s["hidden_size"],
        attention=AttentionConfig(s["num_attention_heads"], bias=s.get("attention_bias", False)),
        feed_forward=GatedMLPConfig(
            s["intermediate_size"], s.activation("hidden_activation"), s.get("mlp_bias", False)
        ),
        norm=LayerNormConfig(s.get("norm_eps", 1e-5), s.get("norm_bias", False)),
        positions=_rotary(s, FULL, "global_rope_theta", 160_000.0),
        pattern=s.layer_specs(kinds, *(SLIDING if i % every else FULL for i in range(depth))),
        vocab_size=s["vocab_size"],
        embedding_norm=True,
        skip_first_attention_norm=True,
        head=head(
            s,
            "ModernBert",
            pooler=None,
            masked=dense,
            documents=dense,
            tokens=dense,
            pooling=MeanOfTokens() if s.get("classifier_pooling") == "mean" else FirstToken(),
            dropouts=(s.get("classifier_dropout", 0.0),) * 2,
            bias=s.get("decoder_bias", True),
        ),
    )


def _rotary(s: HFConfig, layer_type: str, older: str, theta: float) -> Rotary:
    """Positions of layers of a type, whose theta older configs name by itself."""
    return s.rotary(layer_type, s.get(older, theta))


def fields(config: EncoderConfig, length: int) -> dict[str, Any]:
    """What ModernBERT's `config.json` says of an encoder."""
    narrow = next(
        (k for k in config.layer_specs if isinstance(k, Bidirectional) and k.left is not None), None
    )
    types = [SLIDING if kind == narrow else FULL for kind in config.layer_specs]
    whole = config.positions
    turned = {FULL: whole, SLIDING: (narrow and narrow.positions) or whole}
    dense = config.head.dense or DenseConfig()
    pooling = getattr(config.head, "pooling", None)
    return {
        **size_fields(config),
        "attention_bias": config.attention.bias is True,
        "hidden_activation": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "mlp_bias": config.feed_forward.bias,
        "norm_eps": config.norm.epsilon,
        "norm_bias": isinstance(config.norm, LayerNormConfig) and config.norm.bias,
        "layer_types": types,
        "local_attention": 2 * (narrow.left or 0) if narrow else 128,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": p.theta if isinstance(p, Rotary) else 10_000.0}
            for kind, p in turned.items()
        },
        "max_position_embeddings": length,
        "classifier_activation": HF_ACTIVATION_NAMES.get(dense.activation),
        "classifier_bias": dense.bias,
        "classifier_pooling": "mean" if isinstance(pooling, MeanOfTokens) else "cls",
        "decoder_bias": getattr(config.head, "bias", True),
        "tie_word_embeddings": getattr(config.head, "tied", True),
        "vocab_size": config.vocab_size,
        **dict.fromkeys(("cls_token_id", "sep_token_id")),
        **label_fields(config.head.labels if isinstance(config.head, ClassifierConfig) else 2),
    }


OURS, THEIRS = "layers/{layer}", "model.layers.{layer}"
TENSORS = (
    TensorMapping("embedding/table", "model.embeddings.tok_embeddings.weight"),
    *norm("embedding_norm", "model.embeddings.norm"),
    *norm(f"{OURS}/attention_norm", f"{THEIRS}.attn_norm"),
    *linear(f"{OURS}/attention/query", f"{THEIRS}.attn.Wqkv", "(part h d) e -> e h d"),
    *linear(f"{OURS}/attention/key", f"{THEIRS}.attn.Wqkv", "(part h d) e -> e h d"),
    *linear(f"{OURS}/attention/value", f"{THEIRS}.attn.Wqkv", "(part h d) e -> e h d"),
    TensorMapping(f"{OURS}/attention/out/kernel", f"{THEIRS}.attn.Wo.weight", "e (h d) -> h d e"),
    TensorMapping(f"{OURS}/attention/out/bias", f"{THEIRS}.attn.Wo.bias"),
    *norm(f"{OURS}/feed_forward_norm", f"{THEIRS}.mlp_norm"),
    *linear(f"{OURS}/feed_forward/gate", f"{THEIRS}.mlp.Wi", "(part f) e -> e f"),
    *linear(f"{OURS}/feed_forward/up", f"{THEIRS}.mlp.Wi", "(part f) e -> e f"),
    *linear(f"{OURS}/feed_forward/down", f"{THEIRS}.mlp.Wo"),
    *norm("norm", "model.final_norm"),
    *masked_lm("head.dense", "head.norm", "decoder.bias", "decoder"),
    *classifier("document_labels", "classifier", "head.dense", "head.norm"),
    *classifier("token_labels", "classifier", "head.dense", "head.norm"),
)
FAMILIES = {"modernbert": family(modernbert, "ModernBert", "model.", TENSORS, (r"decoder\.weight",), fields)}
