"""ModernBERT: an encoder with RoPE, gated MLPs and alternating sliding layers."""

from typing import Any

from attnlab.layers import AttentionConfig, Bidirectional, GatedMLPConfig, LayerNormConfig, Rotary
from attnlab.models import ClassifierConfig, DenseConfig, EncoderConfig, FirstToken, MeanOfTokens
from attnlab.pretrained.families.base import label_fields, linear, norm, size_fields
from attnlab.pretrained.families.encoders import classifier, family, head, masked_lm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

FULL, SLIDING = "full_attention", "sliding_attention"


def modernbert(hf: HFConfig) -> EncoderConfig:
    """ModernBERT (Warner et al. 2024, arXiv 2412.13663, section 2.1)."""
    for name in ("attention_dropout", "embedding_dropout", "mlp_dropout"):
        hf.require(name, 0.0)
    hf.require("sparse_prediction", False)
    hf.require("classifier_pooling", "cls", "mean")
    depth, every = hf["num_hidden_layers"], hf.get("global_attn_every_n_layers", 3)
    half = hf.get("local_attention", 128) // 2
    specs = {
        FULL: Bidirectional(),
        SLIDING: Bidirectional(half, half, positions=_rotary(hf, SLIDING, "local_rope_theta", 10_000.0)),
    }
    dense = DenseConfig(hf.activation("classifier_activation"), hf.get("classifier_bias", False), norm=True)
    return EncoderConfig(
        depth=depth,
        width=hf["hidden_size"],
        attention=AttentionConfig(hf["num_attention_heads"], bias=hf.get("attention_bias", False)),
        feed_forward=GatedMLPConfig(
            hf["intermediate_size"], hf.activation("hidden_activation"), hf.get("mlp_bias", False)
        ),
        norm=LayerNormConfig(hf.get("norm_eps", 1e-5), hf.get("norm_bias", False)),
        positions=_rotary(hf, FULL, "global_rope_theta", 160_000.0),
        pattern=hf.layer_specs(specs, *(SLIDING if i % every else FULL for i in range(depth))),
        vocab_size=hf["vocab_size"],
        embedding_norm=True,
        skip_first_attention_norm=True,
        head=head(
            hf,
            "ModernBert",
            pooler=None,
            masked=dense,
            documents=dense,
            tokens=dense,
            pooling=MeanOfTokens() if hf.get("classifier_pooling") == "mean" else FirstToken(),
            dropouts=(hf.get("classifier_dropout", 0.0),) * 2,
            bias=hf.get("decoder_bias", True),
        ),
    )


def _rotary(hf: HFConfig, layer_type: str, theta_field: str, theta: float) -> Rotary:
    """Return the rotary embedding of a layer type; older configs have `theta_field`."""
    return hf.rotary(layer_type, hf.get(theta_field, theta))


def fields(config: EncoderConfig, length: int) -> dict[str, Any]:
    """Return ModernBERT's `config.json` for an encoder."""
    specs = config.layer_specs
    sliding = next(
        (spec for spec in specs if isinstance(spec, Bidirectional) and spec.left is not None), None
    )
    types = [SLIDING if spec == sliding else FULL for spec in specs]
    positions = {FULL: config.positions, SLIDING: (sliding and sliding.positions) or config.positions}
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
        "local_attention": 2 * (sliding.left or 0) if sliding else 128,
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": p.theta if isinstance(p, Rotary) else 10_000.0}
            for layer_type, p in positions.items()
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


PARAM, HF = "layers/{layer}", "model.layers.{layer}"
TENSORS = (
    TensorMapping("embedding/table", "model.embeddings.tok_embeddings.weight"),
    *norm("embedding_norm", "model.embeddings.norm"),
    *norm(f"{PARAM}/attention_norm", f"{HF}.attn_norm"),
    *linear(f"{PARAM}/attention/query", f"{HF}.attn.Wqkv", "(part h d) e -> e h d"),
    *linear(f"{PARAM}/attention/key", f"{HF}.attn.Wqkv", "(part h d) e -> e h d"),
    *linear(f"{PARAM}/attention/value", f"{HF}.attn.Wqkv", "(part h d) e -> e h d"),
    TensorMapping(f"{PARAM}/attention/out/kernel", f"{HF}.attn.Wo.weight", "e (h d) -> h d e"),
    TensorMapping(f"{PARAM}/attention/out/bias", f"{HF}.attn.Wo.bias"),
    *norm(f"{PARAM}/feed_forward_norm", f"{HF}.mlp_norm"),
    *linear(f"{PARAM}/feed_forward/gate", f"{HF}.mlp.Wi", "(part f) e -> e f"),
    *linear(f"{PARAM}/feed_forward/up", f"{HF}.mlp.Wi", "(part f) e -> e f"),
    *linear(f"{PARAM}/feed_forward/down", f"{HF}.mlp.Wo"),
    *norm("norm", "model.final_norm"),
    *masked_lm("head.dense", "head.norm", "decoder.bias", "decoder"),
    *classifier("document_labels", "classifier", "head.dense", "head.norm"),
    *classifier("token_labels", "classifier", "head.dense", "head.norm"),
)
FAMILIES = {"modernbert": family(modernbert, "ModernBert", "model.", TENSORS, fields=fields)}
