"""Decoders of Llama's kin whose feed-forward layers are mixtures of experts."""

from dataclasses import replace
from typing import Any

from attnlab.layers import Experts
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import linear
from attnlab.pretrained.families.llama import PRE, family, llama, llama_tensors, mistral
from attnlab.pretrained.hf_config import Settings
from attnlab.pretrained.table import Tensor


def mixtral(s: Settings) -> DecoderConfig:
    """Mixtral: Mistral with a mixture of experts in each layer (arXiv 2401.04088, section 2.1)."""
    return replace(mistral(s), feed_forward=_experts(s))


def _experts(s: Settings, **changes: Any) -> Experts:
    """The experts of a config; they are balanced only where it asks for the router's loss."""
    s.require("router_jitter_noise", 0.0)
    experts = Experts(
        s["num_local_experts"],
        s["num_experts_per_tok"],
        s["intermediate_size"],
        s.activation("hidden_act"),
        balance=s["router_aux_loss_coef"] if s.get("output_router_logits", False) else 0.0,
    )
    return replace(experts, **changes)


def gpt_oss(s: Settings) -> DecoderConfig:
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


def _mixtral_experts() -> list[Tensor]:
    ours, theirs = "layers/{layer}/feed_forward", "model.layers.{layer}.block_sparse_moe"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        Tensor(f"{ours}/router/kernel", f"{theirs}.gate.weight", "x e -> e x"),
        *(
            Tensor(f"{ours}/{a}/kernel", f"{theirs}.experts.{{expert}}.{b}.weight", "o i -> i o")
            for a, b in names.items()
        ),
    ]


def _gpt_oss_experts() -> list[Tensor]:
    ours, theirs = "layers/{layer}/feed_forward", "model.layers.{layer}.mlp"
    rows = [*linear(f"{ours}/router", f"{theirs}.router", "x e -> e x")]
    for name in ("gate", "up"):
        joined = f"{theirs}.experts.gate_up_proj"
        rows.append(Tensor(f"{ours}/{name}/kernel", joined, "x e (f part) -> x e f"))
        rows.append(Tensor(f"{ours}/{name}/bias", f"{joined}_bias", "x (f part) -> x f"))
    rows.append(Tensor(f"{ours}/down/kernel", f"{theirs}.experts.down_proj"))
    rows.append(Tensor(f"{ours}/down/bias", f"{theirs}.experts.down_proj_bias"))
    return rows


FAMILIES = {
    "mixtral": family(mixtral, "MixtralForCausalLM", llama_tensors(PRE, feed_forward=_mixtral_experts())),
    "gpt_oss": family(gpt_oss, "GptOssForCausalLM", llama_tensors(PRE, feed_forward=_gpt_oss_experts())),
}
