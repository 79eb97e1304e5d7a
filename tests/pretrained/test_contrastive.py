"""CLIP and SigLIP of transformers with random weights, read, compared and written again."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from attnlab.inspect.maps import in_order
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import assert_written_again, close, saved, saved_gradients

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
# Class, settings, whether texts are padded, and the size of the images that it is given.
CASES = {
    "clip": ("CLIP", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 24}, True, (16, 16)),
    "clip, the end by its rank, other sizes": (
        "CLIP",
        {"text_config": TEXT | {"eos_token_id": 2, "hidden_act": "gelu"}, "vision_config": IMAGE, "projection_dim": 24},
        False,
        (24, 8),
    ),
    "siglip": ("Siglip", {"text_config": TEXT | {"projection_size": 32}, "vision_config": IMAGE}, False, (16, 24)),
}  # fmt: skip


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        name, settings, *_ = CASES[case]
        config = getattr(transformers, f"{name}Config")(**settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}Model")(config)
        model.logit_scale.data.fill_(1.0)
        return saved(model, tmp_path_factory.mktemp("peer"))

    return cache(make)


def batch(case):
    """Texts that end at different places, which of their tokens are there, and images."""
    rng = np.random.default_rng(1)
    _, _, padded, sides = CASES[case]
    ids = rng.integers(3, 60, (4, 9))
    ends = np.array([8, 3, 5, 8])
    ids[np.arange(4), ends] = 66
    there = (np.arange(9)[None] <= ends[:, None]) if padded else np.ones((4, 9), bool)
    images = rng.normal(size=(4, *sides, 3)).astype(np.float32)
    return np.where(there, ids, 0), there.astype(np.int32), images


def theirs(peer, case, **options):
    torch = pytest.importorskip("torch")
    ids, there, images = batch(case)
    mask = {"attention_mask": torch.tensor(there)} if CASES[case][2] else {}
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    return peer.hf_model(
        torch.tensor(ids), pixels, interpolate_pos_encoding=True, return_loss=True, **mask, **options
    )


def inputs(case):
    ids, there, images = batch(case)
    return {"tokens": ids.astype(np.int32), "segment_ids": there, "source": images}


def everything(model, tokens, segment_ids, source):
    """Logits of pairs, both vectors and, in what is captured, all layers."""
    images, texts = model.encode_image(source), model.encode_text(tokens, segment_ids)
    return images, texts, model.pair_logits(images, texts, segment_ids)


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    with torch.no_grad():
        expected = theirs(peer, case, output_hidden_states=True, output_attentions=True)
    with jax.set_mesh(peer.mesh):
        run = jax.jit(partial(peer.model.apply, method=everything, mutable=["intermediates"]))
        (images, texts, pairs), captured = run({"params": peer.params}, **inputs(case))
    close(images, expected.image_embeds)
    close(texts, expected.text_embeds)
    close(pairs.of_text, expected.logits_per_text)
    close(pairs.of_image, expected.logits_per_image)
    there = batch(case)[1].astype(bool)
    for name, real in (("image", np.s_[:, :]), ("text", there)):
        layers = captured["intermediates"][name]["layers"]
        wanted = getattr(expected, {"image": "vision"}.get(name, name) + "_model_output")
        hidden = in_order(layers, "hidden")
        for ours, one in zip(hidden, wanted.hidden_states[: len(hidden)], strict=True):
            close(np.asarray(ours)[real], one.numpy()[real])
        for ours, one in zip(
            in_order(layers, "attention", "attention_weights"), wanted.attentions, strict=True
        ):
            close(np.asarray(ours).swapaxes(1, 2)[real], one.numpy().swapaxes(1, 2)[real])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(peer, case, tmp_path):
    pytest.importorskip("torch")
    peer = peer(case)
    peer.hf_model.zero_grad()
    loss = theirs(peer, case).loss
    loss.backward()

    def ours(params, inputs):
        s = peer.model.apply({"params": params}, targets=inputs["tokens"], **inputs, method="loss_terms")
        return (s.lse - s.target_logit)[:, 0].mean()

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(ours))(peer.params, inputs(case))
    close(value, loss.detach(), 1e-5)
    wanted = saved_gradients(peer.hf_model, tmp_path)
    found = peer.named(grads)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        expected = wanted[name]
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-6 if name.endswith("k_proj.bias") else 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    assert_written_again(peer(case), tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("siglip", "Siglip")])
def test_what_a_config_leaves_out_is_what_it_means_there(kind, name):
    transformers = pytest.importorskip("transformers")
    said = {"text_config": {}, "vision_config": {}}
    whole = getattr(transformers, f"{name}Config")(**said).to_dict()
    short, long = (FAMILIES[kind].config(HFConfig(fields, "config.json")) for fields in (said, whole))
    assert short.canonical() == long.canonical()
