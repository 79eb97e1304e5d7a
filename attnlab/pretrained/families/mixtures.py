"""Decoders of Llama's kin whose feed-forward layers are mixtures of experts."""

from dataclasses import replace
from typing import Any

from attnlab.layers import ExpertsConfig
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import linear
from attnlab.pretrained.families.llama import PRE, family, llama, llama_tensors, mistral
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def mixtral(s: HFConfig) -> DecoderConfig:
    """Mixtral: Mistral with a mixture of experts in each layer (arXiv 2401.04088, section 2.1)."""
    return replace(mistral(s), feed_forward=_experts(s))


def _experts(s: HFConfig, **changes: Any) -> ExpertsConfig:
    """The experts of a config; they are balanced only where it asks for the router's loss."""
    s.require("router_jitter_noise", 0.0)
    experts = ExpertsConfig(
        s["num_local_experts"],
        s["num_experts_per_tok"],
        s["intermediate_size"],
        s.activation("hidden_act"),
        balance_loss_weight=s["router_aux_loss_coef"] if s.get("output_router_logits", False) else 0.0,
    )
    return replace(experts, **changes)


def gpt_oss(s: HFConfig) -> DecoderConfig:
    """gpt-oss: sinks, biases, layers that slide in turn, clamped experts (arXiv 2508.10925, section 2)."""
    s.require("swiglu_alpha", 1.702)
    s.require("swiglu_limit", 7.0)
    config = llama(s)
    return replace(
        config,
        attention=replace(config.attention, sinks=True),
        feed_forward=_experts(s, bias=True, activation="clamped_swiglu"),
        pattern=s.pattern("sliding_attention", "full_attention"),
    )


def _mixtral_experts() -> list[TensorMapping]:
    param, hf_name = "layers/{layer}/feed_forward", "model.layers.{layer}.block_sparse_moe"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        TensorMapping(f"{param}/router/kernel", f"{hf_name}.gate.weight", "x e -> e x"),
        *(
            TensorMapping(f"{param}/{a}/kernel", f"{hf_name}.experts.{{expert}}.{b}.weight", "o i -> i o")
            for a, b in names.items()
        ),
    ]


def _gpt_oss_experts() -> list[TensorMapping]:
    param, hf_name = "layers/{layer}/feed_forward", "model.layers.{layer}.mlp"
    rows = [*linear(f"{param}/router", f"{hf_name}.router", "x e -> e x")]
    for name in ("gate", "up"):
        joined = f"{hf_name}.experts.gate_up_proj"
        rows.append(TensorMapping(f"{param}/{name}/kernel", joined, "x e (f part) -> x e f"))
        rows.append(TensorMapping(f"{param}/{name}/bias", f"{joined}_bias", "x (f part) -> x f"))
    rows.append(TensorMapping(f"{param}/down/kernel", f"{hf_name}.experts.down_proj"))
    rows.append(TensorMapping(f"{param}/down/bias", f"{hf_name}.experts.down_proj_bias"))
    return rows


FAMILIES = {
    "mixtral": family(mixtral, "MixtralForCausalLM", llama_tensors(PRE, feed_forward=_mixtral_experts())),
    "gpt_oss": family(gpt_oss, "GptOssForCausalLM", llama_tensors(PRE, feed_forward=_gpt_oss_experts())),
}
