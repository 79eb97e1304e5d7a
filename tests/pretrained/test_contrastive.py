"""CLIP and SigLIP of transformers with random weights: outputs, gradients and export."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from attnlab.models.canonical import canonical
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import assert_close, assert_export_roundtrip, save_and_import, saved_gradients

pytestmark = pytest.mark.parity

IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 66,
}
# Class, settings, whether texts are padded, and the image size of the inputs.
CASES = {
    "clip": ("CLIP", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 24}, True, (16, 16)),
    "clip, end token by highest id, other sizes": (
        "CLIP",
        {"text_config": TEXT | {"eos_token_id": 2, "hidden_act": "gelu"}, "vision_config": IMAGE, "projection_dim": 24},
        False,
        (24, 8),
    ),
    "siglip": ("Siglip", {"text_config": TEXT | {"projection_size": 32}, "vision_config": IMAGE}, False, (16, 24)),
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        name, settings, *_ = CASES[case]
        config = getattr(transformers, f"{name}Config")(**settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}Model")(config)
        model.logit_scale.data.fill_(1.0)
        return save_and_import(model, tmp_path_factory.mktemp("imported"))

    return cache(make)


def batch(case):
    """Return texts of unequal lengths, their mask, and images."""
    rng = np.random.default_rng(1)
    _, _, padded, sides = CASES[case]
    ids = rng.integers(3, 60, (4, 9))
    ends = np.array([8, 3, 5, 8])
    ids[np.arange(4), ends] = 66
    valid = (np.arange(9)[None] <= ends[:, None]) if padded else np.ones((4, 9), bool)
    images = rng.normal(size=(4, *sides, 3)).astype(np.float32)
    return np.where(valid, ids, 0), valid.astype(np.int32), images


def hf_outputs(imported, case, **options):
    torch = pytest.importorskip("torch")
    ids, valid, images = batch(case)
    mask = {"attention_mask": torch.tensor(valid)} if CASES[case][2] else {}
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    return imported.hf_model(
        torch.tensor(ids), pixels, interpolate_pos_encoding=True, return_loss=True, **mask, **options
    )


def inputs(case):
    ids, valid, images = batch(case)
    return {"tokens": ids.astype(np.int32), "segment_ids": valid, "source": images}


def outputs(model, tokens, segment_ids, source):
    """Return both embeddings and the pair logits; the layers are in the intermediates."""
    images, texts = model.encode_image(source), model.encode_text(tokens, segment_ids)
    return images, texts, model.pair_logits(images, texts, segment_ids)


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(imported, case):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    with torch.no_grad():
        expected = hf_outputs(imported, case, output_hidden_states=True, output_attentions=True)
    with jax.set_mesh(imported.mesh):
        run = jax.jit(partial(imported.model.apply, method=outputs, mutable=["intermediates"]))
        (images, texts, pairs), captured = run({"params": imported.params}, **inputs(case))
    assert_close(images, expected.image_embeds)
    assert_close(texts, expected.text_embeds)
    assert_close(pairs.of_text, expected.logits_per_text)
    assert_close(pairs.of_image, expected.logits_per_image)
    valid = batch(case)[1].astype(bool)
    for name, real in (("image", np.s_[:, :]), ("text", valid)):
        layers = captured["intermediates"][name]["layers"]
        wanted = getattr(expected, {"image": "vision"}.get(name, name) + "_model_output")
        hidden = in_order(layers, "hidden")
        for actual, layer in zip(hidden, wanted.hidden_states[: len(hidden)], strict=True):
            assert_close(np.asarray(actual)[real], layer.numpy()[real])
        for actual, layer in zip(
            in_order(layers, "attention", "attention_weights"), wanted.attentions, strict=True
        ):
            assert_close(np.asarray(actual).swapaxes(1, 2)[real], layer.numpy().swapaxes(1, 2)[real])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(imported, case, tmp_path):
    pytest.importorskip("torch")
    imported = imported(case)
    imported.hf_model.zero_grad()
    loss = hf_outputs(imported, case).loss
    loss.backward()

    def loss_fn(params, inputs):
        s = imported.model.apply({"params": params}, targets=inputs["tokens"], **inputs, method="loss_terms")
        return (s.lse - s.target_logit)[:, 0].mean()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params, inputs(case))
    assert_close(value, loss.detach(), 1e-5)
    wanted = saved_gradients(imported.hf_model, tmp_path)
    actual = imported.named(grads)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        expected = wanted[name]
        # A bias of the keys alone has no gradient except for rounding.
        bound = 1e-6 if name.endswith("k_proj.bias") else 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    assert_export_roundtrip(imported(case), tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("siglip", "Siglip")])
def test_omitted_fields_have_the_defaults_of_transformers(kind, name):
    transformers = pytest.importorskip("transformers")
    partial_fields = {"text_config": {}, "vision_config": {}}
    full_fields = getattr(transformers, f"{name}Config")(**partial_fields).to_dict()
    from_partial, from_full = (
        FAMILIES[kind].config(HFConfig(fields, "config.json")) for fields in (partial_fields, full_fields)
    )
    assert canonical(from_partial) == canonical(from_full)


@pytest.mark.parametrize(
    "older",
    [
        {"text_config_dict": {"hidden_size": 32, "num_attention_heads": 4}},
        {"vision_config_dict": {"patch_size": 4, "hidden_act": "gelu"}, "text_config_dict": {}},
        {"text_config": None, "text_config_dict": TEXT | {"eos_token_id": 2}},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_older_fields_replace_the_newer_ones_as_in_transformers(older):
    transformers = pytest.importorskip("transformers")
    fields = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 24} | older
    fields = {name: value for name, value in fields.items() if value is not None}
    merged = transformers.CLIPConfig(**fields).to_dict()
    assert not any(name.endswith("_config_dict") for name in merged)
    actual, expected = (FAMILIES["clip"].config(HFConfig(f, "config.json")) for f in (fields, merged))
    assert canonical(actual) == canonical(expected)
