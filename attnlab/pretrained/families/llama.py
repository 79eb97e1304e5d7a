"""Llama and decoders that differ from it in a few settings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnlab.layers import AttentionConfig, Causal, GatedMLPConfig, RMSNormConfig, Rotary, Sliding
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import Family, linear, size_fields
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping

TANH_GELU = "gelu_pytorch_tanh"


def llama(hf: HFConfig, activation: str = "hidden_act") -> DecoderConfig:
    """Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2).

    `activation` names the field of the activation function.
    """
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        depth=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        attention=AttentionConfig(
            heads,
            kv_heads=hf.get("num_key_value_heads", heads),
            head_dim=hf.get("head_dim", hf["hidden_size"] // heads),
            bias=hf.get("attention_bias", False),
            dropout=hf.get("attention_dropout", 0.0),
        ),
        feed_forward=GatedMLPConfig(
            hf["intermediate_size"],
            hf.activation(activation),
            hf.get("mlp_bias", False),
        ),
        norm=RMSNormConfig(hf["rms_norm_eps"]),
        positions=hf.rotary(),
        vocab_size=hf["vocab_size"],
        tied=hf.get("tie_word_embeddings", False),
    )


def fields(config: DecoderConfig, length: int) -> dict[str, Any]:
    """Return the `config.json` of Llama, Mistral, Qwen and similar decoders."""
    types = [
        "sliding_attention" if isinstance(spec, Sliding) else "full_attention" for spec in config.layer_specs
    ]
    windows = [spec.window for spec in config.layer_specs if isinstance(spec, Sliding)]
    theta = config.positions.theta if isinstance(config.positions, Rotary) else 10_000.0
    return {
        **size_fields(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.attention.bias is True,
        "hidden_act": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "mlp_bias": config.feed_forward.bias,
        "rms_norm_eps": config.norm.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": length,
        "layer_types": types,
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }


def mistral(hf: HFConfig) -> DecoderConfig:
    """Mistral: all layers have a sliding window, or none (arXiv 2310.06825, section 2)."""
    window = hf.get("sliding_window")
    return replace(llama(hf), pattern=(Causal() if window is None else Sliding(window),))


def qwen2(hf: HFConfig) -> DecoderConfig:
    """Qwen 2: biases in the query, key and value projections (arXiv 2407.10671, section 2.2)."""
    config = _llama_with_layer_types(hf)
    return replace(config, attention=replace(config.attention, bias="qkv"))


def qwen3(hf: HFConfig) -> DecoderConfig:
    """Qwen 3: QK norm (arXiv 2505.09388, section 2)."""
    config = _llama_with_layer_types(hf)
    return replace(config, attention=replace(config.attention, qk_norm=True))


def _llama_with_layer_types(hf: HFConfig) -> DecoderConfig:
    """Return Llama with `layer_types`, or with sliding windows from `max_window_layers` on."""
    config = llama(hf)
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window", False) else config.depth
    types = ("sliding_attention" if i >= first else "full_attention" for i in range(config.depth))
    return replace(config, pattern=hf.pattern(*types))


def olmo2(hf: HFConfig) -> DecoderConfig:
    """OLMo 2: norms after each branch, QK norm over all heads together (arXiv 2501.00656)."""
    config = llama(hf)
    return replace(config, attention=replace(config.attention, qk_norm="whole"), placement="branch")


def phi3(hf: HFConfig) -> DecoderConfig:
    """Phi-3: fused projections (arXiv 2404.14219)."""
    hf = hf.with_defaults(original_max_position_embeddings=4096)
    return replace(mistral(hf), dropout=hf.get("resid_pdrop", 0.0))


def gemma(hf: HFConfig) -> DecoderConfig:
    """Gemma (arXiv 2403.08295, section 2): scaled embeddings, zero-centered scales, GeGLU.

    Its first configs call the tanh approximation "gelu". transformers ignores `hidden_activation`.
    """
    name = hf.get("hidden_act", "gelu")
    return _gemma(hf.changed(hidden_act=TANH_GELU if name == "gelu" else name), "hidden_act")


def _gemma(hf: HFConfig, activation: str) -> DecoderConfig:
    """Return the settings that all versions of Gemma share.

    `activation` names the field of the activation function.
    """
    norm = RMSNormConfig(hf["rms_norm_eps"], zero_centered_scale=True)
    tied = hf.get("tie_word_embeddings", True)
    return replace(llama(hf, activation), norm=norm, scale_embedding=True, tied=tied)


def gemma2(hf: HFConfig) -> DecoderConfig:
    """Gemma 2: norms before and after branches, softcaps (arXiv 2408.00118, section 2)."""
    config = _gemma(hf.with_defaults(hidden_activation=TANH_GELU), "hidden_activation")
    hf.require("use_bidirectional_attention", None, False)
    attention = replace(
        config.attention,
        scale=hf["query_pre_attn_scalar"] ** -0.5,
        softcap=hf.get("attn_logit_softcapping"),
    )
    return replace(
        config,
        attention=attention,
        placement="both",
        pattern=hf.pattern("sliding_attention", "full_attention"),
        logit_softcap=hf.get("final_logit_softcapping"),
    )


def gemma3(hf: HFConfig) -> DecoderConfig:
    """Gemma 3: five sliding layers, with their own RoPE, per full layer (arXiv 2503.19786)."""
    hf = hf.with_defaults(rope_local_base_freq=10_000.0)
    config = gemma2(hf)
    return replace(
        config,
        attention=replace(config.attention, qk_norm=True),
        positions=hf.rotary(theta=1_000_000.0),
        pattern=hf.pattern(
            *["sliding_attention"] * (hf.get("sliding_window_pattern", 6) - 1), "full_attention"
        ),
    )


HEADS = "(h d) e -> e h d"
FUSED = {  # Phi-3
    **dict.fromkeys(("query", "key", "value"), ("self_attn.qkv_proj", "(part h d) e -> e h d")),
    **dict.fromkeys(("gate", "up"), ("mlp.gate_up_proj", "(part f) e -> e f")),
}
SEPARATE = {
    **{name: (f"self_attn.{name[0]}_proj", HEADS) for name in ("query", "key", "value")},
    **{name: (f"mlp.{name}_proj", "f e -> e f") for name in ("gate", "up")},
}


def _dense(projections) -> list[TensorMapping]:
    param, hf_name = "layers/{layer}/feed_forward", "model.layers.{layer}"
    rows = [*linear(f"{param}/down", f"{hf_name}.mlp.down_proj")]
    for name in ("gate", "up"):
        projection, layout = projections[name]
        rows += linear(f"{param}/{name}", f"{hf_name}.{projection}", layout)
    return rows


def llama_tensors(
    norms: dict[str, str], qk_norm: str = "", projections=SEPARATE, feed_forward: Sequence[TensorMapping] = ()
) -> tuple[TensorMapping, ...]:
    """Return the tensor mappings of Llama and similar decoders.

    Args:
      norms: the tensor names of the norms by parameter name.
      qk_norm: the layout of the query and key norms.
      projections: the tensor name and layout of each projection.
      feed_forward: the mappings of the feed-forward layer; by default those of a gated MLP.
    """
    param, hf_name = "layers/{layer}", "model.layers.{layer}"
    rows = [TensorMapping("embedding/table", "model.embed_tokens.weight")]
    rows += [TensorMapping(f"{param}/{a}/scale", f"{hf_name}.{b}.weight") for a, b in norms.items()]
    for name in ("query", "key", "value"):
        projection, layout = projections[name]
        rows += linear(f"{param}/attention/{name}", f"{hf_name}.{projection}", layout)
    for name in ("query", "key"):
        rows.append(
            TensorMapping(
                f"{param}/attention/{name}_norm/scale", f"{hf_name}.self_attn.{name[0]}_norm.weight", qk_norm
            )
        )
    return (
        *rows,
        TensorMapping(f"{param}/attention/sinks", f"{hf_name}.self_attn.sinks"),
        TensorMapping(
            f"{param}/attention/out/kernel", f"{hf_name}.self_attn.o_proj.weight", "e (h d) -> h d e"
        ),
        TensorMapping(f"{param}/attention/out/bias", f"{hf_name}.self_attn.o_proj.bias"),
        *(feed_forward or _dense(projections)),
        TensorMapping("norm/scale", "model.norm.weight"),
        TensorMapping("readout/table", "lm_head.weight"),
    )


PRE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
BRANCH = {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
BOTH = BRANCH | {"attention_norm": "input_layernorm", "feed_forward_norm": "pre_feedforward_layernorm"}


def family(config, architecture: str, tensors: tuple[TensorMapping, ...] = llama_tensors(PRE)) -> Family:
    """Return a family of Llama-like decoders."""
    readout = TensorMapping("embedding/table", "lm_head.weight")
    ignored = (r".*\.rotary_emb\.inv_freq",)
    return Family(config, tensors, "model.", architecture, fields, ignored, readout=readout)


FAMILIES = {
    "llama": family(llama, "LlamaForCausalLM"),
    "mistral": family(mistral, "MistralForCausalLM"),
    "qwen2": family(qwen2, "Qwen2ForCausalLM"),
    "qwen3": family(qwen3, "Qwen3ForCausalLM"),
    "olmo2": family(olmo2, "Olmo2ForCausalLM", llama_tensors(BRANCH, "(h d) -> h d")),
    "phi3": family(phi3, "Phi3ForCausalLM", llama_tensors(PRE, projections=FUSED)),
    "gemma": family(gemma, "GemmaForCausalLM"),
    "gemma2": family(gemma2, "Gemma2ForCausalLM", llama_tensors(BOTH)),
    "gemma3_text": family(gemma3, "Gemma3ForCausalLM", llama_tensors(BOTH)),
}
