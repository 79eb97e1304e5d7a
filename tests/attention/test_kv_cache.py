"""Attention over each KV cache, written a few tokens at a time, is that over all of them."""

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


def by_chunks(cache, attend_over):
    """Outputs of all tokens, each chunk written and then attended from."""
    outs, start = [], 0
    for count in CHUNKS:
        query, key, value = (x[:, start : start + count] for x in ARRAYS)
        cache, out = attend_over(cache, jnp.int32(start), query, key, value)
        outs.append(out)
        start += count
    return jnp.concatenate(outs, axis=1)


@jax.jit
def in_place(cache, start, query, key, value):
    cache = cache.write(start, key, value)
    return cache, attend(query, *cache.read(query.dtype), mask=cache.mask(start, query.shape[1]))


@pytest.mark.parametrize("slots", [12, 17])
def test_rolling_is_a_window_over_all(slots):
    got = by_chunks(RollingKVCache.empty(2, slots, 7, 2, D, jnp.float32), in_place)
    expected = attend(*ARRAYS, mask=causal() & window(6))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_rolling_refuses_to_write_over_what_is_seen(refuses):
    with refuses("12 slots take 6 tokens at a time for a window of 7", "not 8"):
        RollingKVCache.empty(2, 12, 7, 2, D, jnp.float32).write(0, ARRAYS[1][:, :8], ARRAYS[2][:, :8])


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.int8, 7), (jnp.float8_e4m3fn, 3), (jnp.float8_e5m2, 2)], ids=str
)
def test_eight_bits_come_as_near_as_their_rounding(dtype, bits):
    empty = QuantizedKVCache.empty(2, T, 2, D, dtype)
    got = by_chunks(empty, in_place)
    cache = empty.write(0, *ARRAYS[1:])
    for x, y in zip(cache.read(jnp.float32), ARRAYS[1:], strict=True):
        # Half a unit in the last place of the largest number of each vector.
        assert (jnp.abs(x - y) <= 1.01 * 2.0 ** -(bits + 1) * jnp.abs(y).max(-1, keepdims=True)).all()
    # Written at once or a few at a time, and attended to as what was stored.
    expected = attend(ARRAYS[0], *cache.read(jnp.float32), mask=causal())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if dtype == jnp.int8:
        np.testing.assert_allclose(got, attend(*ARRAYS, mask=causal()), atol=0.05)


def test_pages_of_rows_of_unequal_lengths():
    """Two rows that share a pool, the second with fewer tokens in each chunk, its pages not in order."""
    table = jnp.array([[3, 0, 5, 1, 9, 8, -1], [7, 2, 4, 6, -1, -1, -1]])
    cache = PagedKVCache.empty(table, 10, 4, 2, D, jnp.float32)
    query, key, value = ARRAYS
    taken = jnp.zeros(2, jnp.int32)
    outs = [[], []]
    for count in CHUNKS:
        counts = jnp.array([count, (count + 1) // 2])
        rows = jnp.arange(2)[:, None]
        at = jnp.minimum(taken[:, None] + jnp.arange(count)[None], T - 1)
        q, k, v = query[rows, at], key[rows, at], value[rows, at]
        cache = cache.write(k, v, counts)
        # The queries of the shorter row are aligned to its end.
        q = jnp.stack([jnp.roll(q[r], count - int(counts[r]), axis=0) for r in range(2)])
        out = attend(q, *cache.read(jnp.float32), mask=cache.mask(count))
        for r in range(2):
            outs[r].append(out[r, count - int(counts[r]) :])
        taken += counts
    expected = attend(*ARRAYS, mask=causal())
    assert cache.lengths.tolist() == [T, 14]
    for r, length in enumerate((T, 14)):
        np.testing.assert_allclose(jnp.concatenate(outs[r]), expected[r, :length], rtol=1e-5, atol=1e-5)


def test_a_row_without_pages_loses_its_tokens_and_spoils_no_other():
    cache = PagedKVCache.empty(jnp.array([[0, 1], [-1, -1]]), 2, 4, 2, D, jnp.float32)
    cache = cache.write(ARRAYS[1][:, :6], ARRAYS[2][:, :6])
    out = attend(ARRAYS[0][:, :6], *cache.read(jnp.float32), mask=cache.mask(6))
    np.testing.assert_allclose(
        out[0], attend(*(x[:1, :6] for x in ARRAYS), mask=causal())[0], rtol=1e-5, atol=1e-5
    )
    assert (out[1] == 0).all()
