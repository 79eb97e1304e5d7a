"""Vision Transformers of transformers with random weights, read, compared and written again."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import assert_written_again, close, saved, saved_gradients

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
# Class, settings, and the size of the images that it is given.
CASES = {
    "vit": ("ViTModel", SMALL, (16, 16)),
    "vit, other sizes": ("ViTForImageClassification", SMALL | {"qkv_bias": False}, (12, 24)),
    "vit, neither square": (
        "ViTForImageClassification",
        SMALL | {"image_size": [12, 20], "patch_size": [4, 5], "num_channels": 1, "hidden_act": "gelu_new"},
        (12, 20),
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", SMALL, (20, 8)),
    "deit, one head": ("DeiTForImageClassification", SMALL, (16, 16)),
    "dinov2, gated, hidden patches": ("Dinov2Model", DINO | {"use_swiglu_ffn": True, "mlp_ratio": 4}, (16, 24)),
    "dinov2": ("Dinov2ForImageClassification", DINO | {"use_mask_token": False}, (16, 16)),
    "registers": ("Dinov2WithRegistersForImageClassification", DINO | {"num_register_tokens": 3}, (12, 28)),
    "siglip, other sizes, pixels left over": ("SiglipVisionModel", SMALL | {"image_size": 19}, (14, 31)),
    "clip, other sizes": ("CLIPVisionModel", SMALL, (8, 20)),
}  # fmt: skip


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        name, settings, _ = CASES[case]
        model = getattr(transformers, name)
        config = model.config_class(**settings)
        config._attn_implementation = "eager"
        return saved(model(config), tmp_path_factory.mktemp("peer"))

    return cache(make)


def images(peer, case, rows=3):
    """Noise (B, height, width, channels), and which patches are hidden, where the model can hide them."""
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(rows, *CASES[case][2], peer.hf_model.config.num_channels)).astype(np.float32)
    masked = None
    if "hidden patches" in case:
        masked = rng.random((rows, np.prod([side // 4 for side in CASES[case][2]]))) < 0.3
    return pixels, masked


def theirs(peer, case, pixels, masked, **options):
    torch = pytest.importorskip("torch")
    if "Dinov2" not in type(peer.hf_model).__name__:
        options["interpolate_pos_encoding"] = "other sizes" in case or "deit" in case
    if masked is not None:
        options["bool_masked_pos"] = torch.tensor(masked)
    return peer.hf_model(torch.tensor(pixels.transpose(0, 3, 1, 2)), **options)


def outputs(model, pixels, masked):
    """The last layer's tokens, the same after the last norm, what they are pooled to, and what comes of that."""
    raw = model.encode(pixels, None, masked, final_norm=False)
    normed = replace(raw, hidden=model.norm(raw.hidden))
    pooled = model.pooled(normed)
    return raw.hidden, normed.hidden, pooled, model.classify(pooled) if model.classes else pooled


@pytest.mark.parametrize("case", CASES)
def test_outputs_hidden_states_and_maps(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    pixels, masked = images(peer, case)
    with torch.no_grad():
        expected = theirs(peer, case, pixels, masked, output_hidden_states=True, output_attentions=True)
    with jax.set_mesh(peer.mesh):
        run = jax.jit(partial(peer.model.apply, method=outputs, mutable=["intermediates"]))
        found, captured = run({"params": peer.params}, pixels, masked)
    raw, normed, pooled, last = map(np.asarray, found)
    layers = captured["intermediates"]["layers"]
    for ours, wanted in zip([*in_order(layers, "hidden"), raw], expected.hidden_states, strict=True):
        close(ours, wanted)
    maps = in_order(layers, "attention", "attention_weights")
    for ours, wanted in zip(maps, expected.attentions, strict=True):
        close(ours, wanted)
    if "logits" in expected:
        close(last[:, 0], expected.logits)
    else:
        close(raw if "clip" in case else normed, expected.last_hidden_state)
        close(pooled[:, 0], expected.pooler_output)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(peer, case, tmp_path):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    (pixels, masked), targets = images(peer, case), np.array([0, 3, 1])
    expected = theirs(peer, case, pixels, masked)
    wanted_output = expected.logits if "logits" in expected else expected.pooler_output
    peer.hf_model.zero_grad()
    loss = torch.nn.functional.cross_entropy(wanted_output, torch.tensor(targets))
    loss.backward()
    for p in peer.hf_model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def ours(params, pixels, masked, targets):
        if not peer.model.classes:
            y = peer.model.apply({"params": params}, pixels, masked, method=outputs)[2]
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(y), targets[:, None, None], axis=-1))
        inputs = {"tokens": jnp.zeros((3, 1), jnp.int32), "targets": targets[:, None], "source": pixels}
        s = peer.model.apply({"params": params}, **inputs, method="loss_terms")
        return jnp.mean(s.lse - s.target_logit)

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(ours))(peer.params, pixels, masked, targets)
    close(value, loss.detach(), 1e-5)
    wanted = saved_gradients(peer.hf_model, tmp_path)
    found = peer.named(grads)
    for name, grad in found.items():
        expected = wanted[name if name in wanted else name.removeprefix(peer.family.prefix)]
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-6 if name.endswith(("key.bias", "k_proj.bias")) else 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=bound, err_msg=name)
    assert len(found) == len(wanted)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    peer = peer(case)
    assert_written_again(peer, tmp_path)
    assert peer.family.architecture_of(peer.config) == type(peer.hf_model).__name__


@pytest.mark.parametrize(("kind", "changes", "told"), [
    ("vit", {"pooler_act": "relu"}, "pooler_act='relu' is not supported; it may be 'tanh'"),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ("dinov2", {"drop_path_rate": 0.1, "mlp_ratio": 2}, "drop_path_rate=0.1"),
    ("siglip_vision_model", {"vision_use_head": False}, "vision_use_head=False"),
])  # fmt: skip
def test_what_a_checkpoint_asks_for_and_is_not_here_is_refused(kind, changes, told, refuses):
    names = {"vit": "ViTModel", "dinov2": "Dinov2Model"}
    said = SMALL | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "architectures": [names.get(kind)]}  # fmt: skip
    with refuses("config.json", told):
        FAMILIES[kind].config(HFConfig(said | changes, "config.json"))
