"""Mixtral and gpt-oss: Llama-like decoders with mixture-of-experts layers."""

from dataclasses import replace
from typing import Any

from attnlab.layers import ExpertsConfig
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import linear
from attnlab.pretrained.families.llama import PRE, family, llama, llama_tensors, mistral
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def mixtral(hf: HFConfig) -> DecoderConfig:
    """Mixtral: Mistral with a mixture of experts in each layer (arXiv 2401.04088, section 2.1)."""
    return replace(mistral(hf), feed_forward=_experts(hf))


def _experts(hf: HFConfig, **changes: Any) -> ExpertsConfig:
    """Return the experts; they have a balance loss only with `output_router_logits`."""
    hf.require("router_jitter_noise", 0.0)
    experts = ExpertsConfig(
        hf["num_local_experts"],
        hf["num_experts_per_tok"],
        hf["intermediate_size"],
        hf.activation("hidden_act"),
        balance_loss_weight=hf["router_aux_loss_coef"] if hf.get("output_router_logits", False) else 0.0,
    )
    return replace(experts, **changes)


def gpt_oss(hf: HFConfig) -> DecoderConfig:
    """gpt-oss (arXiv 2508.10925, section 2): sinks, biases, sliding layers, clamped experts."""
    hf.require("swiglu_alpha", 1.702)
    hf.require("swiglu_limit", 7.0)
    config = llama(hf)
    return replace(
        config,
        attention=replace(config.attention, sinks=True),
        feed_forward=_experts(hf, bias=True, activation="clamped_swiglu"),
        pattern=hf.pattern("sliding_attention", "full_attention"),
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
        fused = f"{hf_name}.experts.gate_up_proj"
        rows.append(TensorMapping(f"{param}/{name}/kernel", fused, "x e (f part) -> x e f"))
        rows.append(TensorMapping(f"{param}/{name}/bias", f"{fused}_bias", "x (f part) -> x f"))
    rows.append(TensorMapping(f"{param}/down/kernel", f"{hf_name}.experts.down_proj"))
    rows.append(TensorMapping(f"{param}/down/bias", f"{hf_name}.experts.down_proj_bias"))
    return rows


FAMILIES = {
    "mixtral": family(mixtral, "MixtralForCausalLM", llama_tensors(PRE, feed_forward=_mixtral_experts())),
    "gpt_oss": family(gpt_oss, "GptOssForCausalLM", llama_tensors(PRE, feed_forward=_gpt_oss_experts())),
}
