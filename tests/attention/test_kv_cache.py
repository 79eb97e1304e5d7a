"""Attention over each KV cache, written in chunks, against attention over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal, segments, shift_mask, t5_bias, window
from attnlab.attention.kv_cache import KVCache, PagedKVCache, QuantizedKVCache, RollingKVCache
from tests.attention.inputs import qkv

T, D = 24, 8
QUERY, KEY, VALUE = ARRAYS = qkv(0, t=T, s=T, d=D, dv=D)
CHUNKS = [5, 1, 1, 6, 1, 4, 6]
STARTS = jnp.array([0, 9])  # the first token of each row; the second row is left-padded
SEGMENTS = (jnp.arange(T)[None] >= STARTS[:, None]).astype(jnp.int32)
TABLE = jnp.array([[3, 0, 5, 1, 9, 8], [7, 2, 4, 6, -1, -1]])  # for pages of 4 tokens
SPAN = 7
CACHES = {
    "contiguous": lambda: KVCache.empty(2, T, 2, D, jnp.float32),
    "rolling": lambda: RollingKVCache.empty(2, SPAN, 2, D, jnp.float32),
    "rolling with spare": lambda: RollingKVCache.empty(2, SPAN, 2, D, jnp.float32, spare=4),
    "paged": lambda: PagedKVCache.empty(TABLE, 10, 4, 2, D, jnp.float32),
    "int8": lambda: QuantizedKVCache.empty(2, T, 2, D, jnp.int8),
}
BIAS = jnp.linspace(-1, 1, 32 * 4).reshape(32, 4)


@jax.jit
def append_and_attend(cache, start, query, key, value, filled):
    """Return the cache with new tokens, and attention of their queries, as a decoder layer does."""
    cache, cached = cache.append(start, key, value, STARTS)
    queries = jax.lax.dynamic_slice_in_dim(filled, start, query.shape[1], axis=1)
    mask = cached.mask(shift_mask(causal(start) & window(SPAN - 1, None, start), STARTS))
    mask = mask & segments(queries, cached.gather(filled))
    return cache, attend(query, cached.key, cached.value, mask=mask)


def run(cache, chunks, arrays=ARRAYS, start=0):
    """Return the cache after these chunks, and the outputs of all tokens."""
    outs = []
    for count in chunks:
        query, key, value = (x[:, start : start + count] for x in arrays)
        filled = SEGMENTS * (jnp.arange(T)[None] < start + count)
        cache, out = append_and_attend(cache, start, query, key, value, filled)
        outs.append(out)
        start += count
    return cache, jnp.concatenate(outs, axis=1)


def expected_output(arrays=ARRAYS):
    mask = causal() & window(SPAN - 1, None) & segments(SEGMENTS)
    return attend(*arrays, mask=mask)


@pytest.mark.parametrize("kind", ["contiguous", "rolling", "rolling with spare", "paged"])
def test_cache_in_chunks_matches_attention_over_all_tokens(kind):
    _, got = run(CACHES[kind](), CHUNKS)
    np.testing.assert_allclose(got, expected_output(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["contiguous", "rolling with spare", "paged", "int8"])
def test_tokens_taken_back_leave_no_trace(kind):
    """Four tokens are written and taken back, as rejected draft tokens are."""
    cache, before = run(CACHES[kind](), [5, 6])
    for _ in range(2):
        cache, _ = run(cache, [4], [x[:, ::-1] for x in ARRAYS], start=11)
    _, after = run(cache, [1, 3, 1, 8], start=11)
    _, straight = run(CACHES[kind](), [5, 6, 1, 3, 1, 8])
    np.testing.assert_array_equal(jnp.concatenate([before, after], axis=1), straight)


def test_rolling_cache_holds_one_window():
    cache = CACHES["rolling"]()
    assert cache.key.shape == (2, SPAN, 2, D)
    cache, _ = run(cache, CHUNKS)
    assert sorted(cache.slots.tolist()) == list(range(T - SPAN, T))


def test_scores_see_the_slots_of_the_keys(refuses):
    cache, _ = run(CACHES["rolling"](), CHUNKS[:-1])
    _, cached = cache.append(T - 6, KEY[:, T - 6 :], VALUE[:, T - 6 :], STARTS * 0)
    at = {"mask": cached.mask(window(SPAN - 1, 0, T - 6)), "score": cached.score(t5_bias(BIAS, offset=T - 6))}
    got = attend(QUERY[:, T - 6 :], cached.key, cached.value, **at)
    expected = attend(*ARRAYS, mask=window(SPAN - 1, 0), score=t5_bias(BIAS))
    np.testing.assert_allclose(got, expected[:, T - 6 :], rtol=1e-5, atol=1e-5)
    _, cached = CACHES["paged"]().append(0, KEY, VALUE, STARTS)
    with refuses("kv_cache=paged does not support scores"):
        cached.score(t5_bias(BIAS))


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.int8, 7), (jnp.float8_e4m3fn, 3), (jnp.float8_e5m2, 2)], ids=str
)
def test_quantized_cache_error_is_at_most_one_rounding(dtype, bits):
    empty = QuantizedKVCache.empty(2, T, 2, D, dtype)
    _, cached = empty.append(0, KEY, VALUE, STARTS)
    for x, y in ((cached.key, KEY), (cached.value, VALUE)):
        largest = jnp.abs(y).max(-1, keepdims=True)
        if dtype == jnp.int8:
            bound = jnp.broadcast_to(largest / 254, y.shape)
        else:  # half a unit in the last place of a normal number, and of a subnormal one
            smallest = float(jnp.finfo(dtype).smallest_subnormal) / float(jnp.finfo(dtype).max)
            bound = jnp.maximum(2.0 ** -(bits + 1) * jnp.abs(y), largest * smallest / 2)
        assert (jnp.abs(x - y) <= 1.001 * bound).all()
        assert not (x == y).all()
    # Chunked and single writes store the same values, and attention uses the stored values.
    _, got = run(empty, CHUNKS)
    expected = expected_output((QUERY, cached.key, cached.value))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_row_without_pages_drops_only_its_own_tokens():
    table = jnp.array([[0, 1], [-1, -1]])
    cache = PagedKVCache.empty(table, 2, 4, 2, D, jnp.float32)
    _, cached = cache.append(0, KEY[:, :6], VALUE[:, :6], jnp.zeros(2, int))
    out = attend(QUERY[:, :6], cached.key, cached.value, mask=cached.mask(causal()))
    first = attend(*(x[:1, :6] for x in ARRAYS), mask=causal())
    np.testing.assert_allclose(out[:1], first, rtol=1e-5, atol=1e-5)
    assert (out[1] == 0).all()
