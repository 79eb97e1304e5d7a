"""Vision-language models: image tokens before or within the text, causal or bidirectional."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import Bytes
from attnlab.generation import Generator, SamplingParams
from attnlab.models import Learned, ProjectorConfig, VisionLanguageConfig
from attnlab.sharding import make_mesh, parse_mesh
from tests.models.test_captioner import DECODER, ENCODER, IMAGES, TOKENS, check_cache, check_mesh, draw, start

CONFIG = VisionLanguageConfig(ENCODER, DECODER, projector=ProjectorConfig("gelu"))
PATCHES = 6


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cached_decoding_repeats_full_forward(bidirectional):
    # With bidirectional prompts, a cached prompt attends to more tokens than `check_cache` assumes.
    if not bidirectional:
        return check_cache(CONFIG)
    model, _, params = start(replace(CONFIG, bidirectional_prompt=True))
    run = jax.jit(partial(model.apply, {"params": params}))
    prompt = jnp.ones_like(TOKENS).at[:, 5:].set(0)
    whole = run(TOKENS, source=IMAGES, prompt=prompt)
    out, cache = run(TOKENS[:, :5], cache=model.init_cache(4, 9), source=IMAGES)
    parts = [out]
    for i in (5, 6):
        out, cache = run(TOKENS[:, i : i + 1], cache=cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_vision_language_on_mesh_repeats_gradients(mesh_of):
    check_mesh(replace(CONFIG, bidirectional_prompt=True), mesh_of("data:2,fsdp:2,tensor:2"))


def test_attended_tokens_with_causal_and_bidirectional_prompt():
    """A bidirectional prompt attends to itself in both directions; all other tokens are causal."""

    def attended(config, **options):
        model, _, params = start(config)
        table = params["decoder"]["embedding"]["table"]

        def outputs(table):
            changed = {**params, "decoder": {**params["decoder"], "embedding": {"table": table}}}
            return model.apply({"params": changed}, ids, source=IMAGES[:1], method="hidden", **options)[0]

        ids = jnp.arange(1, 8, dtype=jnp.int32)[None]
        jacobian = jax.jit(jax.jacrev(lambda table: jnp.sin(outputs(table)).sum(-1)))(table)
        return np.abs(jacobian[:, 1:8]).max(-1) > 1e-7  # (position, token)

    causal = np.tri(7, dtype=bool)
    np.testing.assert_array_equal(attended(CONFIG), causal)
    prompt = jnp.array([[1, 1, 1, 0, 0, 0, 0]])
    prefix_lm = causal.copy()
    prefix_lm[:3, :3] = True
    config = replace(CONFIG, bidirectional_prompt=True)
    np.testing.assert_array_equal(attended(config, prompt=prompt), prefix_lm)


def test_leading_image_tokens_match_prepended_image():
    model, _, params = start(CONFIG)
    within = replace(CONFIG, image_token_id=99).build(29)
    ids = jnp.concatenate([jnp.full((4, PATCHES), 99), TOKENS], axis=1)
    before = jax.jit(model.apply)({"params": params}, TOKENS, source=IMAGES)
    got = jax.jit(within.apply)({"params": params}, ids, source=IMAGES)
    np.testing.assert_allclose(got[:, PATCHES:], before, rtol=1e-4, atol=1e-4)


def test_greedy_captions_match_full_forwards():
    """Prompts of unequal length are padded between the image and the text."""
    tokenizer, mesh = Bytes().train([]), make_mesh(parse_mesh("single", 1))
    model = replace(CONFIG, bidirectional_prompt=True).build(tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, source=IMAGES))["params"]
    shardings = jax.tree.map(lambda x: jax.NamedSharding(mesh, x.sharding.spec), shapes)
    params = jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes), shardings)
    generate = Generator(model, params, tokenizer, 24, mesh)
    options = {"max_new_tokens": 4, "sampling": SamplingParams(temperature=0.0)}
    captions = generate(["abc", "d"], sources=list(IMAGES[:2]), **options)
    run = jax.jit(model.apply)
    for row, text in enumerate(("abc", "d")):
        ids = tokenizer.encode_prompt(text)
        text_ids = [*ids, *captions[row].tokens]
        padded = jnp.asarray([text_ids + [0] * (8 - len(text_ids))], jnp.int32)
        prompt = (jnp.arange(8) < len(ids)).astype(jnp.int32)[None]
        with jax.set_mesh(mesh):
            out = run({"params": params}, padded, source=IMAGES[row : row + 1], prompt=prompt)[0]
        best = np.asarray(out).argmax(-1)[len(ids) - 1 : len(text_ids) - 1]
        assert captions[row].tokens == best.tolist() and len(best) == 4


def test_vision_language_length_check_and_flops(refuses):
    learned = replace(CONFIG, decoder=replace(DECODER, positions=Learned(12)))
    learned.check_length(12 - PATCHES)
    with refuses("length 13", "positions.length=12"):
        learned.check_length(13 - PATCHES)
    flops = CONFIG.token_flops(29, 8)
    encoder = 7 * 2 * (4 * 12 * 12 + 2 * 12 * 20) + PATCHES * 16 * 12
    projector, length = PATCHES * (12 * 16 + 16 * 16), PATCHES + 8
    decoder = length * 2 * (2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 24)
    assert flops.weights == pytest.approx(2 * ((encoder + projector + decoder) / 8 + 29 * 16))
    pairs = 12 * 2 * 7 * 7 + 16 * 2 * length * (length + 1) / 2
    assert flops.attention == pytest.approx(4 * pairs / 8)
