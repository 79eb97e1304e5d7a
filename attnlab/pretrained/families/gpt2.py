"""GPT-2: a decoder with learned positions, layer norms and biases."""

from dataclasses import replace
from typing import Any

from attnlab.layers import AttentionConfig, Causal, LayerNormConfig, MLPConfig
from attnlab.models import DecoderConfig, Learned
from attnlab.pretrained.families.base import Family, norm
from attnlab.pretrained.hf_config import HF_ACTIVATION_NAMES, HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def gpt2(hf: HFConfig) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019)."""
    hf.require("add_cross_attention", False)
    config = decoder(hf)
    if not hf.get("scale_attn_by_inverse_layer_idx", False):
        return config
    scales = [(config.attention.scale or config.head_dim**-0.5) / (i + 1) for i in range(config.depth)]
    return replace(config, pattern=tuple(Causal(scale=scale) for scale in scales))


def decoder(hf: HFConfig) -> DecoderConfig:
    """Return the decoder config of GPT-2, with or without cross-attention.

    `reorder_and_upcast_attn` only changes the rounding of half-precision scores.
    """
    scale = None if hf.get("scale_attn_weights", True) else 1.0
    return DecoderConfig(
        depth=hf["n_layer"],
        width=hf["n_embd"],
        attention=AttentionConfig(
            heads=hf["n_head"], bias=True, scale=scale, dropout=hf.get("attn_pdrop", 0.0)
        ),
        feed_forward=MLPConfig(hf.get("n_inner"), hf.activation("activation_function")),
        norm=LayerNormConfig(hf["layer_norm_epsilon"]),
        positions=Learned(hf["n_positions"]),
        vocab_size=hf["vocab_size"],
        tied=hf.get("tie_word_embeddings", True),
        dropout=hf.get("resid_pdrop", 0.0),
    )


def fields(config: DecoderConfig, length: int) -> dict[str, Any]:
    """Return GPT-2's `config.json` for a decoder."""
    positions = config.positions.length if isinstance(config.positions, Learned) else length
    return {
        "n_layer": config.depth,
        "n_embd": config.width,
        "n_head": config.attention.heads,
        "n_inner": config.feed_forward.hidden(config.width),
        "n_positions": positions,
        "activation_function": HF_ACTIVATION_NAMES.get(config.feed_forward.activation),
        "layer_norm_epsilon": config.norm.epsilon,
        "scale_attn_weights": config.attention.scale is None,
        "scale_attn_by_inverse_layer_idx": any(spec.scale is not None for spec in config.layer_specs),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }


def _tensors() -> tuple[TensorMapping, ...]:
    param, hf_name = "layers/{layer}", "transformer.h.{layer}"
    attention = [
        row
        for name in ("query", "key", "value")
        for row in (
            TensorMapping(
                f"{param}/attention/{name}/kernel", f"{hf_name}.attn.c_attn.weight", "e (part h d) -> e h d"
            ),
            TensorMapping(
                f"{param}/attention/{name}/bias", f"{hf_name}.attn.c_attn.bias", "(part h d) -> h d"
            ),
        )
    ]
    cross, hf_cross = f"{param}/cross_attention", f"{hf_name}.crossattention"
    for name in ("key", "value"):
        attention += [
            TensorMapping(f"{cross}/{name}/kernel", f"{hf_cross}.c_attn.weight", "e (part h d) -> e h d"),
            TensorMapping(f"{cross}/{name}/bias", f"{hf_cross}.c_attn.bias", "(part h d) -> h d"),
        ]
    return (
        TensorMapping("embedding/table", "transformer.wte.weight"),
        TensorMapping("position_embedding/table", "transformer.wpe.weight"),
        *norm(f"{param}/attention_norm", f"{hf_name}.ln_1"),
        *attention,
        TensorMapping(f"{param}/attention/out/kernel", f"{hf_name}.attn.c_proj.weight", "(h d) e -> h d e"),
        TensorMapping(f"{param}/attention/out/bias", f"{hf_name}.attn.c_proj.bias"),
        *norm(f"{cross}_norm", f"{hf_name}.ln_cross_attn"),
        TensorMapping(f"{cross}/query/kernel", f"{hf_cross}.q_attn.weight", "e (h d) -> e h d"),
        TensorMapping(f"{cross}/query/bias", f"{hf_cross}.q_attn.bias", "(h d) -> h d"),
        TensorMapping(f"{cross}/out/kernel", f"{hf_cross}.c_proj.weight", "(h d) e -> h d e"),
        TensorMapping(f"{cross}/out/bias", f"{hf_cross}.c_proj.bias"),
        *norm(f"{param}/feed_forward_norm", f"{hf_name}.ln_2"),
        TensorMapping(f"{param}/feed_forward/up/kernel", f"{hf_name}.mlp.c_fc.weight"),
        TensorMapping(f"{param}/feed_forward/up/bias", f"{hf_name}.mlp.c_fc.bias"),
        TensorMapping(f"{param}/feed_forward/down/kernel", f"{hf_name}.mlp.c_proj.weight"),
        TensorMapping(f"{param}/feed_forward/down/bias", f"{hf_name}.mlp.c_proj.bias"),
        *norm("norm", "transformer.ln_f"),
        TensorMapping("readout/table", "lm_head.weight"),
    )


FAMILIES = {
    "gpt2": Family(
        gpt2,
        _tensors(),
        prefix="transformer.",
        architecture="GPT2LMHeadModel",
        fields=fields,
        ignored=(r".*\.(cross)?att(entio)?n\.(masked_)?bias",),
        readout=TensorMapping("embedding/table", "lm_head.weight"),
    )
}
