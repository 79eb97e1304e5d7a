"""transformers decoders with random weights: outputs, gradients and export."""

from functools import cache
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from attnlab.layers.position_wise import ACTIVATIONS
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import (
    assert_close,
    assert_export_roundtrip,
    batch,
    compiled_apply,
    positions_of,
    save_and_import,
    saved_gradients,
)

pytestmark = pytest.mark.parity

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_theta": 1000.0}
CASES = {
    "gpt2": ("GPT2", {"vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt2, inner width": (
        "GPT2",
        {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "gpt2, scores scaled by layer": (
        "GPT2",
        {"vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "llama": ("Llama", SMALL),
    "llama, tied, biases, multi-query": (
        "Llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "llama 3": (
        "Llama",
        SMALL | {"rope_parameters": ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "llama, linear": ("Llama", SMALL | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "llama, dynamic": ("Llama", SMALL | {"max_position_embeddings": 8, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "llama, yarn": ("Llama", SMALL | {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("Mistral", SMALL | {"sliding_window": 4, "head_dim": 12}),
    "mistral, full": ("Mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2, sliding": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 12, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", SMALL),
    "phi3": ("Phi3", SMALL | {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3, long": (
        "Phi3",
        SMALL | {"sliding_window": 5, "original_max_position_embeddings": 32, "rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}},
    ),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        SMALL
        | {"head_dim": 12, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 3}
        | {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}},
    ),
    "gemma": ("Gemma", SMALL | {"head_dim": 16}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3",
        SMALL | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20, "num_hidden_layers": 7, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    "starcoder2": ("Starcoder2", SMALL | {"sliding_window": 4}),
    "starcoder2, untied, without biases": (
        "Starcoder2",
        SMALL | {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False, "rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    ),
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def decoder(case, folder):
    """Return the `Imported` model of a case."""
    transformers = pytest.importorskip("transformers")
    family, settings = CASES[case]
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
    config._attn_implementation = "eager"
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return save_and_import(getattr(transformers, f"{family}{head}")(config), folder)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return cache(lambda case: decoder(case, tmp_path_factory.mktemp("imported")))


def hf_outputs(imported, ids, valid, **options):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        ids, mask, positions = map(torch.tensor, (ids, valid, positions_of(valid)))
        return imported.hf_model(ids, attention_mask=mask, position_ids=positions, **options)


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(imported, case):
    imported = imported(case)
    # Capture the output of the last norm too; blocks sow the other hidden states.
    last_norm = {"capture_intermediates": lambda module, _: module.name == "norm"}
    run = compiled_apply(imported, mutable=["intermediates"], **last_norm)
    for left in (False, True):
        ids, valid = batch(67, left=left)
        expected = hf_outputs(imported, ids, valid, output_hidden_states=True, output_attentions=True)
        logits, captured = run(ids, valid)
        sown, real = captured["intermediates"], valid.astype(bool)
        assert_close(logits[real], expected.logits.numpy()[real])
        hidden = [*in_order(sown["layers"], "hidden"), sown["norm"]["__call__"][0]]
        for actual, wanted in zip(hidden, expected.hidden_states, strict=True):
            assert_close(np.asarray(actual)[real], wanted.numpy()[real])
        maps = in_order(sown["layers"], "attention", "attention_weights")
        for actual, wanted in zip(np.asarray(maps), expected.attentions, strict=True):
            rows = np.broadcast_to(real[:, None, :], actual.shape[:-1])
            assert_close(actual[rows], wanted.numpy()[rows])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(imported, case, tmp_path):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid = batch(67)
    labels = torch.tensor(np.where(valid, ids, -100))
    imported.hf_model.zero_grad()
    loss = imported.hf_model(torch.tensor(ids), attention_mask=torch.tensor(valid), labels=labels).loss
    loss.backward()

    targets, weights = np.roll(ids, -1, axis=1), np.roll(valid, -1, axis=1)
    weights[:, -1] = 0

    def loss_fn(params):
        s = imported.model.apply(
            {"params": params}, *map(jnp.asarray, (ids, targets, valid)), method="loss_terms"
        )
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params)
    assert_close(value, loss.detach().numpy(), 1e-5)
    wanted = saved_gradients(imported.hf_model, tmp_path)
    actual = imported.named(grads)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        expected = wanted[name]
        np.testing.assert_allclose(
            grad, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    assert_export_roundtrip(imported(case), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu"},
        {"hidden_activation": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["gemma", "gemma2", "gemma3"])
def test_gemma_has_the_activation_of_transformers(case, fields):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, settings = CASES[case]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**settings, **fields)
    modeling = import_module(f"transformers.models.{case}.modeling_{case}")
    expected = getattr(modeling, f"{name}MLP")(config).act_fn(torch.linspace(-4, 4, 33))
    # The fields as in the file, which may omit those that transformers fills in.
    saved = {k: v for k, v in config.to_dict().items() if k not in ("hidden_act", "hidden_activation")}
    model = FAMILIES[saved["model_type"]].config(HFConfig(saved | fields, "config.json"))
    actual = ACTIVATIONS[model.feed_forward.activation](jnp.linspace(-4, 4, 33))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
