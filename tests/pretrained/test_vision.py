"""transformers Vision Transformers with random weights: outputs, gradients and export."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import assert_close, assert_export_roundtrip, save_and_import, saved_gradients

pytestmark = pytest.mark.parity

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
DINO = {name: value for name, value in SMALL.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
# Class, settings, and the image size of the inputs.
CASES = {
    "vit": ("ViTModel", SMALL, (16, 16)),
    "vit, other sizes": ("ViTForImageClassification", SMALL | {"qkv_bias": False}, (12, 24)),
    "vit, images and patches not square": (
        "ViTForImageClassification",
        SMALL | {"image_size": [12, 20], "patch_size": [4, 5], "num_channels": 1, "hidden_act": "gelu_new"},
        (12, 20),
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", SMALL, (20, 8)),
    "deit, one head": ("DeiTForImageClassification", SMALL, (16, 16)),
    "dinov2, gated, masked patches": ("Dinov2Model", DINO | {"use_swiglu_ffn": True, "mlp_ratio": 4}, (16, 24)),
    "dinov2": ("Dinov2ForImageClassification", DINO | {"use_mask_token": False}, (16, 16)),
    "registers": ("Dinov2WithRegistersForImageClassification", DINO | {"num_register_tokens": 3}, (12, 28)),
    "siglip, other sizes, remaining pixels": ("SiglipVisionModel", SMALL | {"image_size": 19}, (14, 31)),
    "clip, other sizes": ("CLIPVisionModel", SMALL, (8, 20)),
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        name, settings, _ = CASES[case]
        model = getattr(transformers, name)
        config = model.config_class(**settings)
        config._attn_implementation = "eager"
        return save_and_import(model(config), tmp_path_factory.mktemp("imported"))

    return cache(make)


def images(imported, case, rows=3):
    """Return noise (B, height, width, channels) and a mask of patches, or None."""
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(rows, *CASES[case][2], imported.hf_model.config.num_channels)).astype(
        np.float32
    )
    masked = None
    if "masked patches" in case:
        masked = rng.random((rows, np.prod([side // 4 for side in CASES[case][2]]))) < 0.3
    return pixels, masked


def hf_outputs(imported, case, pixels, masked, **options):
    torch = pytest.importorskip("torch")
    if "Dinov2" not in type(imported.hf_model).__name__:
        options["interpolate_pos_encoding"] = "other sizes" in case or "deit" in case
    if masked is not None:
        options["bool_masked_pos"] = torch.tensor(masked)
    return imported.hf_model(torch.tensor(pixels.transpose(0, 3, 1, 2)), **options)


def outputs(model, pixels, masked):
    """Return the hidden states before and after the last norm, pooled, and logits if any."""
    raw = model.encode(pixels, masked=masked, final_norm=False)
    normed = replace(raw, hidden=model.norm(raw.hidden))
    pooled = model.pooled(normed)
    return raw.hidden, normed.hidden, pooled, model.logits_of(pooled)


@pytest.mark.parametrize("case", CASES)
def test_outputs_hidden_states_and_maps(imported, case):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    pixels, masked = images(imported, case)
    with torch.no_grad():
        expected = hf_outputs(
            imported, case, pixels, masked, output_hidden_states=True, output_attentions=True
        )
    with jax.set_mesh(imported.mesh):
        run = jax.jit(partial(imported.model.apply, method=outputs, mutable=["intermediates"]))
        results, captured = run({"params": imported.params}, pixels, masked)
    raw, normed, pooled, last = map(np.asarray, results)
    layers = captured["intermediates"]["layers"]
    for actual, wanted in zip([*in_order(layers, "hidden"), raw], expected.hidden_states, strict=True):
        assert_close(actual, wanted)
    maps = in_order(layers, "attention", "attention_weights")
    for actual, wanted in zip(maps, expected.attentions, strict=True):
        assert_close(actual, wanted)
    if "logits" in expected:
        assert_close(last[:, 0], expected.logits)
    else:
        assert_close(raw if "clip" in case else normed, expected.last_hidden_state)
        assert_close(pooled[:, 0], expected.pooler_output)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(imported, case, tmp_path):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    (pixels, masked), targets = images(imported, case), np.array([0, 3, 1])
    expected = hf_outputs(imported, case, pixels, masked)
    wanted_output = expected.logits if "logits" in expected else expected.pooler_output
    imported.hf_model.zero_grad()
    loss = torch.nn.functional.cross_entropy(wanted_output, torch.tensor(targets))
    loss.backward()
    for p in imported.hf_model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def loss_fn(params, pixels, masked, targets):
        if not imported.model.classes:
            y = imported.model.apply({"params": params}, pixels, masked, method=outputs)[2]
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(y), targets[:, None, None], axis=-1))
        inputs = {"tokens": jnp.zeros((3, 1), jnp.int32), "targets": targets[:, None], "source": pixels}
        s = imported.model.apply({"params": params}, **inputs, method="loss_terms")
        return jnp.mean(s.lse - s.target_logit)

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params, pixels, masked, targets)
    assert_close(value, loss.detach(), 1e-5)
    wanted = saved_gradients(imported.hf_model, tmp_path)
    actual = imported.named(grads)
    for name, grad in actual.items():
        expected = wanted[name if name in wanted else name.removeprefix(imported.family.prefix)]
        # A bias of the keys alone has no gradient except for rounding.
        bound = 1e-6 if name.endswith(("key.bias", "k_proj.bias")) else 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=bound, err_msg=name)
    assert len(actual) == len(wanted)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    imported = imported(case)
    assert_export_roundtrip(imported, tmp_path)
    assert imported.family.architecture_of(imported.config) == type(imported.hf_model).__name__


@pytest.mark.parametrize(("model_type", "changes", "message"), [
    ("vit", {"pooler_act": "relu"}, "pooler_act='relu' is not supported; it may be 'tanh'"),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ("dinov2", {"drop_path_rate": 0.1, "mlp_ratio": 2}, "drop_path_rate=0.1"),
    ("siglip_vision_model", {"vision_use_head": False}, "vision_use_head=False"),
])  # fmt: skip
def test_unsupported_settings_are_rejected(model_type, changes, message, refuses):
    names = {"vit": "ViTModel", "dinov2": "Dinov2Model"}
    fields = SMALL | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "architectures": [names.get(model_type)]}  # fmt: skip
    with refuses("config.json", message):
        FAMILIES[model_type].config(HFConfig(fields | changes, "config.json"))
