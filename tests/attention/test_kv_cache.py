"""Attention over each KV cache, written in chunks, against attention over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal, window
from attnlab.attention.kv_cache import PagedKVCache, QuantizedKVCache, RollingKVCache
from tests.attention.inputs import qkv

T, D = 24, 8
ARRAYS = qkv(0, t=T, s=T, d=D, dv=D)
CHUNKS = [5, 1, 1, 6, 1, 4, 6]
assert sum(CHUNKS) == T


def attend_in_chunks(cache, attend_over):
    """Return the outputs of all tokens, writing and attending one chunk at a time."""
    outs, start = [], 0
    for count in CHUNKS:
        query, key, value = (x[:, start : start + count] for x in ARRAYS)
        cache, out = attend_over(cache, jnp.int32(start), query, key, value)
        outs.append(out)
        start += count
    return jnp.concatenate(outs, axis=1)


@jax.jit
def write_and_attend(cache, start, query, key, value):
    cache = cache.write(start, key, value)
    return cache, attend(query, *cache.read(query.dtype), mask=cache.mask(start, query.shape[1]))


@pytest.mark.parametrize("slots", [12, 17])
def test_rolling_cache_matches_window_attention(slots):
    got = attend_in_chunks(RollingKVCache.empty(2, slots, 7, 2, D, jnp.float32), write_and_attend)
    expected = attend(*ARRAYS, mask=causal() & window(6))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_rolling_cache_rejects_writes_over_the_window(refuses):
    with refuses("12 slots and window 7", "at most 6 tokens per write, not 8"):
        RollingKVCache.empty(2, 12, 7, 2, D, jnp.float32).write(0, ARRAYS[1][:, :8], ARRAYS[2][:, :8])


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.int8, 7), (jnp.float8_e4m3fn, 3), (jnp.float8_e5m2, 2)], ids=str
)
def test_quantized_cache_error_is_at_most_one_rounding(dtype, bits):
    empty = QuantizedKVCache.empty(2, T, 2, D, dtype)
    got = attend_in_chunks(empty, write_and_attend)
    cache = empty.write(0, *ARRAYS[1:])
    for x, y in zip(cache.read(jnp.float32), ARRAYS[1:], strict=True):
        # Half a unit in the last place of the largest absolute value of each vector.
        assert (jnp.abs(x - y) <= 1.01 * 2.0 ** -(bits + 1) * jnp.abs(y).max(-1, keepdims=True)).all()
    # Chunked and single writes store the same values, and attention uses the stored values.
    expected = attend(ARRAYS[0], *cache.read(jnp.float32), mask=causal())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if dtype == jnp.int8:
        np.testing.assert_allclose(got, attend(*ARRAYS, mask=causal()), atol=0.05)


def test_paged_cache_with_rows_of_unequal_lengths():
    """Two rows share a pool. The second has fewer tokens per chunk; pages are not in order."""
    table = jnp.array([[3, 0, 5, 1, 9, 8, -1], [7, 2, 4, 6, -1, -1, -1]])
    cache = PagedKVCache.empty(table, 10, 4, 2, D, jnp.float32)
    query, key, value = ARRAYS
    positions = jnp.zeros(2, jnp.int32)
    outs = [[], []]
    for count in CHUNKS:
        counts = jnp.array([count, (count + 1) // 2])
        rows = jnp.arange(2)[:, None]
        at = jnp.minimum(positions[:, None] + jnp.arange(count)[None], T - 1)
        q, k, v = query[rows, at], key[rows, at], value[rows, at]
        cache = cache.write(k, v, counts)
        # Right-align the queries of the shorter row.
        q = jnp.stack([jnp.roll(q[r], count - int(counts[r]), axis=0) for r in range(2)])
        out = attend(q, *cache.read(jnp.float32), mask=cache.mask(count))
        for r in range(2):
            outs[r].append(out[r, count - int(counts[r]) :])
        positions += counts
    expected = attend(*ARRAYS, mask=causal())
    assert cache.lengths.tolist() == [T, 14]
    for r, length in enumerate((T, 14)):
        np.testing.assert_allclose(jnp.concatenate(outs[r]), expected[r, :length], rtol=1e-5, atol=1e-5)


def test_row_without_pages_drops_only_its_own_tokens():
    cache = PagedKVCache.empty(jnp.array([[0, 1], [-1, -1]]), 2, 4, 2, D, jnp.float32)
    cache = cache.write(ARRAYS[1][:, :6], ARRAYS[2][:, :6])
    out = attend(ARRAYS[0][:, :6], *cache.read(jnp.float32), mask=cache.mask(6))
    np.testing.assert_allclose(
        out[0], attend(*(x[:1, :6] for x in ARRAYS), mask=causal())[0], rtol=1e-5, atol=1e-5
    )
    assert (out[1] == 0).all()
