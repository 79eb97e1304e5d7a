"""GPT-2: the decoder with learned positions, layer norms and biases."""

from typing import Any

from attnlab.layers import MLP, Attention, LayerNorm
from attnlab.models import DecoderConfig, Learned
from attnlab.pretrained.families.base import Family, norm
from attnlab.pretrained.hf_config import THEIR_NAMES, Settings
from attnlab.pretrained.table import Tensor


def gpt2(s: Settings) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019)."""
    s.require("add_cross_attention", False)
    return decoder(s)


def decoder(s: Settings) -> DecoderConfig:
    """GPT-2, or what it is in a model whose layers look at a memory besides."""
    s.require("scale_attn_by_inverse_layer_idx", False)
    s.require("scale_attn_weights", True)
    return DecoderConfig(
        depth=s["n_layer"],
        width=s["n_embd"],
        attention=Attention(heads=s["n_head"], bias=True, dropout=s.get("attn_pdrop", 0.0)),
        feed_forward=MLP(s.get("n_inner"), s.activation("activation_function")),
        norm=LayerNorm(s["layer_norm_epsilon"]),
        positions=Learned(s["n_positions"]),
        vocab_size=s["vocab_size"],
        tied=s.get("tie_word_embeddings", True),
        dropout=s.get("resid_pdrop", 0.0),
    )


def fields(config: DecoderConfig, length: int) -> dict[str, Any]:
    """What GPT-2's `config.json` says of a decoder."""
    positions = config.positions.length if isinstance(config.positions, Learned) else length
    return {
        "n_layer": config.depth,
        "n_embd": config.width,
        "n_head": config.attention.heads,
        "n_inner": config.feed_forward.hidden(config.width),
        "n_positions": positions,
        "activation_function": THEIR_NAMES.get(config.feed_forward.activation),
        "layer_norm_epsilon": config.norm.epsilon,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }


def _tensors() -> tuple[Tensor, ...]:
    ours, theirs = "layers/{layer}", "transformer.h.{layer}"
    attention = [
        row
        for name in ("query", "key", "value")
        for row in (
            Tensor(
                f"{ours}/attention/{name}/kernel", f"{theirs}.attn.c_attn.weight", "e (part h d) -> e h d"
            ),
            Tensor(f"{ours}/attention/{name}/bias", f"{theirs}.attn.c_attn.bias", "(part h d) -> h d"),
        )
    ]
    cross, looks = f"{ours}/cross_attention", f"{theirs}.crossattention"
    for name in ("key", "value"):
        attention += [
            Tensor(f"{cross}/{name}/kernel", f"{looks}.c_attn.weight", "e (part h d) -> e h d"),
            Tensor(f"{cross}/{name}/bias", f"{looks}.c_attn.bias", "(part h d) -> h d"),
        ]
    return (
        Tensor("embedding/table", "transformer.wte.weight"),
        Tensor("position_embedding/table", "transformer.wpe.weight"),
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *attention,
        Tensor(f"{ours}/attention/out/kernel", f"{theirs}.attn.c_proj.weight", "(h d) e -> h d e"),
        Tensor(f"{ours}/attention/out/bias", f"{theirs}.attn.c_proj.bias"),
        *norm(f"{cross}_norm", f"{theirs}.ln_cross_attn"),
        Tensor(f"{cross}/query/kernel", f"{looks}.q_attn.weight", "e (h d) -> e h d"),
        Tensor(f"{cross}/query/bias", f"{looks}.q_attn.bias", "(h d) -> h d"),
        Tensor(f"{cross}/out/kernel", f"{looks}.c_proj.weight", "(h d) e -> h d e"),
        Tensor(f"{cross}/out/bias", f"{looks}.c_proj.bias"),
        *norm(f"{ours}/feed_forward_norm", f"{theirs}.ln_2"),
        Tensor(f"{ours}/feed_forward/up/kernel", f"{theirs}.mlp.c_fc.weight"),
        Tensor(f"{ours}/feed_forward/up/bias", f"{theirs}.mlp.c_fc.bias"),
        Tensor(f"{ours}/feed_forward/down/kernel", f"{theirs}.mlp.c_proj.weight"),
        Tensor(f"{ours}/feed_forward/down/bias", f"{theirs}.mlp.c_proj.bias"),
        *norm("norm", "transformer.ln_f"),
        Tensor("readout/table", "lm_head.weight"),
    )


FAMILIES = {
    "gpt2": Family(
        gpt2,
        _tensors(),
        prefix="transformer.",
        architecture="GPT2LMHeadModel",
        fields=fields,
        ignored=(r".*\.(cross)?att(entio)?n\.(masked_)?bias", r"(decoder\.)?lm_head\.weight"),
    )
}
