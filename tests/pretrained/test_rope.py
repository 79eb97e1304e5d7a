"""Rotary fields of checkpoints: angles equal transformers, and unknown fields are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
CASES = {
    "default": ("llama", {"rope_theta": 500.0}),
    "linear, older name": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "the older field goes first": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}),
    "dynamic, original length outside": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16, ORIGINAL: 8},
    ),
    "llama3": ("llama", {"rope_scaling": LLAMA3 | {ORIGINAL: 16}}),
    "llama3, no original length": ("llama", {"rope_scaling": LLAMA3}),
    "llama3, original length outside": ("llama", {"rope_scaling": LLAMA3 | {ORIGINAL: 16}, ORIGINAL: 32}),
    "yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16}}),
    "yarn, no original length": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "yarn, null factor": ("llama", {"rope_scaling": {"type": "yarn", "factor": None, ORIGINAL: 16}}),
    "yarn, attention factor": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16, "attention_factor": 1.5, "beta_fast": 16}},
    ),
    "yarn, mscale": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "yarn, one mscale": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16, "mscale": 0.7}}),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", **LONG}, ORIGINAL: 32}),
    "longrope, attention factor": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", **LONG, "attention_factor": 1.5}, ORIGINAL: 32},
    ),
    "longrope, attention factor 1, in use": (
        "phi3",
        {"rope_scaling": {"type": "su", **LONG, "attention_factor": 1.0, "factor": 4.0}, ORIGINAL: 8},
    ),
}  # fmt: skip
POSITIONS = np.arange(24)[None]


def rotated(model_type, fields):
    """Return the factors of cos and sin of each pair, as attnlab computes them."""
    rotary = FAMILIES[model_type].config(HFConfig(SIZES | fields, "config.json")).positions
    ones = jnp.ones((1, POSITIONS.shape[1], 1, 8)).at[..., 4:].set(0)  # (1, 0) becomes (cos, sin)
    turned = np.asarray(rotary(ones, jnp.asarray(POSITIONS)))[0, :, 0]
    return turned[:, :4], turned[:, 4:]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_angles_equal_transformers(case):
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    model_type, fields = CASES[case]
    configs = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}
    modules = {"llama": LlamaRotaryEmbedding, "phi3": Phi3RotaryEmbedding}
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()}  # it changes them
    if copied.get("rope_scaling", {}).get("type") == "su":
        copied["rope_scaling"]["type"] = "longrope"
    module = modules[model_type](configs[model_type](**SIZES | {"pad_token_id": 0} | copied))
    wanted = module(torch.zeros(1, POSITIONS.shape[1], 8), torch.tensor(POSITIONS))
    for actual, expected in zip(rotated(model_type, fields), wanted, strict=True):
        np.testing.assert_allclose(actual, expected[0, :, :4].numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear"}, "rope_scaling lacks 'factor', which rope_type='linear' needs"),
        ({"type": "yarn"}, "rope_scaling lacks 'factor', which rope_type='yarn' needs"),
        ({"type": "dynamic", "factor": None}, "rope_scaling lacks 'factor'"),
        ({"type": "llama3", "factor": 8.0}, "rope_scaling lacks 'low_freq_factor'"),
        ({"type": "longrope", "factor": 8.0}, "rope_scaling lacks 'short_factor'"),
        ({"type": "linear", "factor": 2.0, "attention_factor": 1.5}, "rope_scaling: attention_factor=1.5 is not supported"),
        ({"type": "dynamic", "factor": 2.0, ORIGINAL: 16}, f"rope_scaling: {ORIGINAL}=16 is not supported"),
        ({"type": "longrope", **LONG, "short_mscale": 1.2}, "rope_scaling: short_mscale=1.2 is not supported"),
        ({"factor": 2.0}, "factor=2.0 is not supported with rope_type='default'"),
        ({"type": "magic"}, "rope_type='magic' is not supported"),
        ("linear", 'rope_scaling="linear" is not supported; it must be an object'),
    ],
)  # fmt: skip
def test_incomplete_and_unknown_fields_are_refused(scaling, message, refuses):
    with refuses(message):
        FAMILIES["llama"].config(HFConfig(SIZES | {"rope_scaling": scaling}, "config.json"))


def test_null_fields_are_absent():
    fields = {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": None}}
    FAMILIES["llama"].config(HFConfig(SIZES | fields, "config.json"))
