"""Generation with each kind of KV cache, against the contiguous cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.attention.kv_cache import CachedKeys, KVCache, LayerCache, QuantizedKVCache, RollingKVCache
from attnlab.attention.pairwise import pytree
from attnlab.generation import BeamSearchOptions, Generator, PromptLookup, SamplingParams
from attnlab.generation.decode_state import forward, prefill
from attnlab.generation.kv_caches import KV_CACHES, PAGE_SIZE, KVCacheOptions, count_pages
from attnlab.layers import AttentionConfig, Causal, FoX, RelativeBias, Sliding
from attnlab.models import RecurrentConfig
from attnlab.runner import request
from tests.generation.models import WINDOWED, padded, start
from tests.generation.test_generate import CONFIG, GREEDY, generator
from tests.selection import long

ROWS = jax.P(sharding.BATCH_AXES)
PROMPTS = ["abcdefgh", "hello wor", "x" * 14, "q"]


@pytest.fixture(scope="module")
def contiguous():
    from attnlab.sharding import make_mesh, parse_mesh

    return generator(make_mesh(parse_mesh("single", 1)), context=64)


def with_cache(g, kind, context=None):
    return Generator(g.model, g.params, g.tokenizer, context or g.context, g.mesh, kv_cache=kind)


@pytest.mark.parametrize("kind", ["rolling", "paged"])
def test_greedy_and_sampled_tokens_equal_those_of_the_contiguous_cache(contiguous, kind):
    g = with_cache(contiguous, kind)
    for sampling in (GREEDY, SamplingParams(0.9, top_k=20)):
        options = {"max_new_tokens": 33, "sampling": sampling, "seed": 1}
        assert g(PROMPTS, **options) == contiguous(PROMPTS, **options)


@pytest.mark.parametrize("kind", ["rolling", long("paged")])
def test_speculative_decoding_takes_draft_tokens_back(contiguous, kind):
    options = {"max_new_tokens": 23, "sampling": GREEDY}
    got = with_cache(contiguous, kind)(PROMPTS, speculator=PromptLookup(1, 3), **options)
    assert got == contiguous(PROMPTS, **options)


def test_beam_search(contiguous, refuses):
    options = {"options": BeamSearchOptions(num_beams=3), "num_samples": 3, "max_new_tokens": 12}
    expected = contiguous.beam_search(PROMPTS, **options)
    got = with_cache(contiguous, "rolling").beam_search(PROMPTS, **options)
    assert [x.tokens for x in got] == [x.tokens for x in expected]
    assert len(with_cache(contiguous, "int8").beam_search(PROMPTS, **options)) == len(expected)
    with refuses("kv_cache=paged does not support beam search", "rolling"):
        with_cache(contiguous, "paged").beam_search(PROMPTS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rolling", long("int8")])
def test_tokens_do_not_depend_on_the_mesh(contiguous, mesh_of, kind):
    prompts, options = PROMPTS[:3], {"max_new_tokens": 17, "sampling": GREEDY}
    on_mesh = with_cache(generator(mesh_of("data:2,fsdp:2,tensor:2"), context=64), kind)
    got, expected = on_mesh(prompts, **options), with_cache(contiguous, kind)(prompts, **options)
    assert [x.tokens for x in got] == [x.tokens for x in expected]


def test_paged_cache_on_a_mesh_of_heads(contiguous, mesh_of):
    on_mesh = with_cache(generator(mesh_of("tensor:2"), context=64), "paged")
    options = {"max_new_tokens": 17, "sampling": GREEDY}
    got, expected = on_mesh(PROMPTS, **options), contiguous(PROMPTS, **options)
    assert [x.tokens for x in got] == [x.tokens for x in expected]


@pytest.mark.long
def test_bytes_of_each_kind(contiguous):
    def cache_bytes(kind, prompts, config=CONFIG):
        g = with_cache(contiguous if config is CONFIG else generator(contiguous.mesh, config), kind, 512)
        g(prompts, max_new_tokens=5, sampling=GREEDY)
        return g.kv_cache_bytes

    long_and_short = ["x" * 400, *"abcdefg"]
    plain = cache_bytes("contiguous", long_and_short)
    # One of two layers keeps 5 of over 400 tokens. Seven of eight rows need 2 pages.
    assert 0.5 < cache_bytes("rolling", long_and_short) / plain < 0.53
    assert cache_bytes("paged", long_and_short) < 0.2 * plain
    wide = replace(CONFIG, width=256, attention=AttentionConfig(heads=4))
    plain = cache_bytes("contiguous", ["abc"], wide)
    ratios = [cache_bytes(kind, ["abc"], wide) / plain for kind in ("int8", "fp8")]
    assert all(0.25 < ratio < 0.28 for ratio in ratios)  # of float32; a scale for each 64 numbers


def test_pages_cover_every_slot_after_the_padding():
    padding, slots = np.array([0, 1, 15, 16, 40]), 41
    assert (
        count_pages(padding, slots) == sum(-(-(slots - n) // PAGE_SIZE) for n in padding) == 3 + 3 + 2 + 2 + 1
    )


@pytree
class Perturbed(LayerCache):
    """A contiguous cache whose keys and values are read with an added error."""

    cache: KVCache
    key_error: jax.Array
    value_error: jax.Array

    def append(self, start, key, value, row_starts):
        cache, cached = self.cache.append(start, key, value, row_starts)
        read = CachedKeys(cached.key + self.key_error, cached.value + self.value_error)
        return replace(self, cache=cache), read

    def map_rows(self, function):
        raise NotImplementedError


def rounding_step(x, dtype):
    """Return the largest error of each number of these vectors."""
    largest = jnp.abs(x).max(-1, keepdims=True)
    if dtype == jnp.int8:
        return jnp.broadcast_to(largest / 254, x.shape)
    smallest = float(jnp.finfo(dtype).smallest_subnormal) / float(jnp.finfo(dtype).max)
    return jnp.maximum(jnp.abs(x) / 16, largest * smallest / 2)


@pytest.mark.parametrize("dtype", [jnp.int8, long(jnp.float8_e4m3fn)])
def test_error_of_logits_is_bounded_by_the_quantization_step(dtype):
    """To first order, logits change by at most the sum of |d logits / d x| * step of cached x."""
    model, params = start(WINDOWED, 32, scale=0.15)
    tokens, segments = padded([[5, 9, 3, 17, 8, 2, 11]])
    last, shape = jnp.array([[4]]), (1, 8, 2, 4)
    cache = prefill(model, 8, params, tokens, segments).cache
    is_cache = lambda x: isinstance(x, KVCache)  # noqa: E731

    def quantize(x):
        append = lambda k, v: QuantizedKVCache.empty(*shape, dtype).append(0, k, v, None)[0]  # noqa: E731
        return (append if x.key.ndim == 4 else jax.vmap(append))(x.key, x.value)

    @jax.jit
    def decode(layers):
        new = forward(
            model, params, last, jnp.ones_like(last), 7 * jnp.ones_like(last), replace(cache, layers=layers)
        )
        return new[0][0, 0], new[1].layers

    def perturbed(errors):
        logits, layers = decode(
            jax.tree.map(lambda x, e: Perturbed(x, *e), cache.layers, errors, is_leaf=is_cache)
        )
        return logits, jax.tree.map(
            lambda x: (x.cache.key, x.cache.value), layers, is_leaf=lambda x: isinstance(x, Perturbed)
        )

    zeros = jax.tree.map(
        lambda x: (jnp.zeros_like(x.key), jnp.zeros_like(x.value)), cache.layers, is_leaf=is_cache
    )
    jacobian, stored = jax.jacrev(perturbed, has_aux=True)(zeros)
    bound = sum(
        (jnp.abs(j) * rounding_step(x, dtype)[None]).reshape(32, -1).sum(1)
        for j, x in zip(jax.tree.leaves(jacobian), jax.tree.leaves(stored), strict=True)
    )
    exact, _ = perturbed(zeros)
    got, _ = decode(jax.tree.map(quantize, cache.layers, is_leaf=is_cache))
    error = jnp.abs(got - exact)
    assert (error > 0).all()
    assert (error <= bound).all()


def test_unsupported_models_and_meshes_are_refused(contiguous, mesh_of, refuses):
    with refuses("kv_cache='huge' must be one of contiguous, rolling, paged, int8, fp8"):
        with_cache(contiguous, "huge")
    mesh = contiguous.mesh
    recurrent = generator(mesh, RecurrentConfig(depth=1, width=16))
    with refuses("kv_cache=int8 needs a model with attention"):
        with_cache(recurrent, "int8")(["a"], max_new_tokens=2)
    causal = generator(mesh, replace(CONFIG, pattern=(Causal(),)))
    with refuses("kv_cache=rolling needs a layer with a window", "contiguous, paged, int8 or fp8"):
        with_cache(causal, "rolling")(["a"], max_new_tokens=2)
    relative = generator(mesh, replace(CONFIG, positions=RelativeBias()))
    forgets = generator(mesh, replace(CONFIG, pattern=(Sliding(5, score=FoX()),)))
    with refuses("kv_cache=int8 does not support the score or mixer of Sliding(", "use contiguous"):
        with_cache(forgets, "int8")(["a"], max_new_tokens=2)
    with refuses("kv_cache=paged does not support scores"):
        with_cache(relative, "paged")(["a", "bcd"], max_new_tokens=2)
    with refuses("kv_cache=paged needs all rows on one device"):
        with_cache(generator(mesh_of("data:2")), "paged")


def test_rolling_cache_with_relative_bias(contiguous):
    g = generator(contiguous.mesh, replace(CONFIG, positions=RelativeBias()))
    options = {"max_new_tokens": 17, "sampling": GREEDY}
    assert with_cache(g, "rolling")(PROMPTS, **options) == g(PROMPTS, **options)


def test_short_rows_keep_contiguous_caches():
    model, params = start(WINDOWED, 32)
    tokens, segments = padded([[5, 9, 3]])
    for slots, kind in ((4, False), (5, True)):
        options = KVCacheOptions("rolling")
        cache = jax.eval_shape(
            partial(prefill, model, slots, kv_cache=options), params, tokens, segments
        ).cache
        caches = jax.tree.leaves(cache.layers, is_leaf=lambda x: isinstance(x, RollingKVCache))
        assert any(isinstance(x, RollingKVCache) for x in caches) == kind


def test_flag_and_library_agree_on_the_kinds():
    assert request.KV_CACHES == KV_CACHES


@pytest.mark.parametrize("kind", ["rolling", "paged", "int8"])
def test_a_single_row_keeps_its_sharding(contiguous, kind):
    g = with_cache(contiguous, kind)
    with jax.set_mesh(g.mesh):
        row = jax.ShapeDtypeStruct((1, 4), jnp.int32, sharding=sharding.named_sharding(g.mesh, ROWS))
        options = replace(g.kv_cache, pages=2)
        state = jax.eval_shape(partial(prefill, g.model, 20, kv_cache=options), g.params, row, row)
        token = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=sharding.named_sharding(g.mesh, ROWS))
        new = jax.eval_shape(lambda state, token: state.decode(g.model, g.params, token), state, token)
    for before, after in zip(*map(jax.tree.leaves, (state.cache, new.cache)), strict=True):
        assert before.shape == after.shape and before.sharding == after.sharding
