"""LLaVA and PaliGemma of transformers with random weights, read, compared and written again."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from attnlab.generation import prefill
from attnlab.inspect.maps import in_order
from attnlab.pretrained import checkpoints
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.settings import Settings
from tests.pretrained.peers import close, places, saved, saved_gradients

pytestmark = pytest.mark.parity

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
# A marker that is a word of the vocabulary, and one beyond it; the projector with biases and without.
CASES = {
    "llava": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": -2}),
    "llava, first layer": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": 1, "multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
    "paligemma": ("PaliGemma", "SiglipVision", "Gemma", {"image_token_index": 70}, {"projection_dim": 32, "hidden_size": 32}),
}  # fmt: skip
STEPS, PATCHES = 32, 4


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case):
        name, vision, text, *settings = CASES[case]
        gemma = {"head_dim": 16, "num_key_value_heads": 1} if text == "Gemma" else {}
        head = {"vision_use_head": False} if vision == "SiglipVision" else {}
        config = getattr(transformers, f"{name}Config")(
            vision_config=getattr(transformers, f"{vision}Config")(**VISION, **head),
            text_config=getattr(transformers, f"{text}Config")(**TEXT | gemma),
            **settings[0],
            **settings[1],
        )
        for part in (config, config.vision_config, config.text_config):
            part._attn_implementation = "eager"
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        return saved(model, tmp_path_factory.mktemp("peer"))

    return cache(make)


def inputs(peer, left):
    """Tokens (B, T) with an image among them, which are there, which are the prompt's; and images."""
    rng, marker = np.random.default_rng(1), peer.found[1].marker
    lengths, before = (13, 10), (0, 0) if peer.found[1].ahead else (3, 2)
    ids, there = np.zeros((2, 13), np.int64), np.zeros((2, 13), np.int32)
    for row, (length, first) in enumerate(zip(lengths, before, strict=True)):
        here = slice(13 - length, 13) if left else slice(0, length)
        text = rng.integers(3, 66, length)
        text[first : first + PATCHES] = marker
        ids[row, here], there[row, here] = text, 1
    prompt = there * (places(there) < 8)
    pixels = rng.normal(size=(2, *peer.found[1].source_shape)).astype(np.float32)
    return ids, there, prompt, pixels


def for_torch(peer, ids, there, prompt, pixels):
    torch = pytest.importorskip("torch")
    given = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(there),
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
    }
    return given | ({"token_type_ids": torch.tensor(1 - prompt)} if peer.found[1].ahead else {})


def outputs(model, ids, there, positions, pixels, prompt):
    hidden, _ = model.hidden(ids, there, positions, source=pixels, prompt=prompt)
    return hidden, model.decoder.logits_of(hidden)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(peer, case, left):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, prompt, pixels = inputs(peer, left)
    with torch.no_grad():
        expected = peer.theirs(
            **for_torch(peer, ids, there, prompt, pixels),
            position_ids=torch.tensor(places(there)),
            output_hidden_states=True,
            output_attentions=True,
        )
    with jax.set_mesh(peer.mesh):
        run = jax.jit(partial(peer.model.apply, method=outputs, mutable=["intermediates"]))
        given = jax.tree.map(jnp.asarray, (ids, there, places(there), pixels, prompt))
        found, captured = run({"params": peer.params}, *given)
    hidden, logits = map(np.asarray, found)
    real, layers = there.astype(bool), captured["intermediates"]["decoder"]["layers"]
    close(logits[real], expected.logits[real])
    for ours, wanted in zip([*in_order(layers, "hidden"), hidden], expected.hidden_states, strict=True):
        close(np.asarray(ours)[real], wanted[real])
    rows = real.nonzero()[0], slice(None), real.nonzero()[1]
    maps = np.asarray(in_order(layers, "attention", "attention_weights"))
    for ours, wanted in zip(maps, expected.attentions, strict=True):
        close(ours[rows], wanted.numpy()[rows])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(peer, case, tmp_path):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, prompt, pixels = inputs(peer, left=False)
    answers = there * (1 - prompt)
    labels = torch.tensor(np.where(answers, ids, -100))
    peer.theirs.zero_grad()
    loss = peer.theirs(**for_torch(peer, ids, there, prompt, pixels), labels=labels).loss
    loss.backward()
    for p in peer.theirs.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    targets, weights = np.roll(ids, -1, axis=1), np.roll(answers, -1, axis=1)
    weights[:, -1] = 0

    def ours(params):
        given = map(jnp.asarray, (ids, np.where(weights, targets, 0), there, places(there)))
        images = {"source": jnp.asarray(pixels), "prompt": jnp.asarray(prompt)}
        s = peer.model.apply({"params": params}, *given, **images, method="statistics")
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(ours))(peer.params)
    close(value, loss.detach(), 1e-5)
    wanted, found = saved_gradients(peer.theirs, tmp_path), peer.named(grads)
    unread = {name for name in wanted.keys() - found.keys() if not wanted[name].any()}
    assert found.keys() | unread == wanted.keys()
    for name, grad in found.items():
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-6 if name.endswith("k_proj.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    """All but the layers of a tower after the one that is read."""
    peer = peer(case)
    checkpoints.write_params(tmp_path, peer.found[0], peer.params)
    written, first = load_file(tmp_path / "model.safetensors"), load_file(peer.folder / "model.safetensors")
    for name in first.keys() - written.keys():
        layer = re.fullmatch(r"vision_tower\.(encoder\.layers\.(\d)|post_layernorm)\..*", name)
        assert layer and int(layer[2] or 9) >= peer.found[1].encoder.depth, name
    peer.theirs.config.save_pretrained(tmp_path)
    again = type(peer.theirs).from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    saved_again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved_again.keys() == first.keys()
    for name in written:
        np.testing.assert_array_equal(saved_again[name], first[name], err_msg=name)


def test_names_of_older_checkpoints(peer, tmp_path):
    peer = peer("paligemma")
    tensors = load_file(peer.folder / "model.safetensors")
    older = {n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in tensors.items()}
    save_file(older, tmp_path / "model.safetensors")
    params = checkpoints.read_params(epath.Path(tmp_path), peer.found[0], peer.abstract)
    jax.tree.map(np.testing.assert_array_equal, params, peer.params)


@pytest.mark.parametrize("case", ["llava", "paligemma"])
def test_greedy(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, _, pixels = inputs(peer, left=True)
    peer.theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        given = for_torch(peer, ids, there, np.ones_like(there), pixels)
        expected = peer.theirs.generate(**given, do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
    with jax.set_mesh(peer.mesh):
        tokens, segments = jnp.asarray(ids, jnp.int32), jnp.asarray(there)
        slots = tokens.shape[1] + STEPS
        prefix = prefill(peer.model, slots, peer.params, tokens, segments, source=jnp.asarray(pixels))
        read, got = jax.jit(lambda prefix, params, new: prefix.read(peer.model, params, new)), []
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = read(prefix, peer.params, got[-1])
    assert np.transpose(got).tolist() == expected[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(("kind", "changes", "told"), [
    ("llava", {"vision_feature_select_strategy": "full"}, "'full' is not supported; it may be 'default'"),
    ("llava", {"vision_feature_layer": [1, 2]}, "vision_feature_layer=[1, 2]"),
    ("llava", {"text_config": {"model_type": "opt"}}, "config.json: text_config: model_type='opt'"),
])  # fmt: skip
def test_what_is_not_here_is_refused(kind, changes, told, refuses):
    vision = VISION | {"model_type": "clip_vision_model"}
    said = {"vision_config": vision, "text_config": {"model_type": "llama"}, "image_token_index": 66, "projector_hidden_act": "gelu"}  # fmt: skip
    with refuses(told):
        FAMILIES[kind].config(Settings(said | changes, "config.json"))
