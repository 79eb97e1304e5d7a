"""Masks, scores and caches as pytrees; grids of blocks, and bounds on the blocks of masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import (
    alibi,
    attend,
    causal,
    chunked,
    key_lengths,
    mask_fn,
    per_head,
    prefix,
    score_fn,
    segments,
    shift_mask,
    sinks_and_window,
    softcap,
    window,
)
from attnlab.attention.block_mask import make_block_mask
from attnlab.attention.kv_cache import RollingKVCache
from attnlab.attention.pairwise import BlockGrid, PairwiseFn, restrict_to_bounds, summarize_blocks
from tests.attention.definitions import CASES, B, H, S, expected_mask
from tests.attention.inputs import qkv

VALUES = {name: case().mask for name, case in CASES.items()} | {
    "alibi": alibi(4, offset=2),
    "softcap": softcap(3.0),
    "score_fn": score_fn(lambda s, b, h, q, k: s * 2 - k),
    "rolling cache": RollingKVCache.empty(1, 4, 1, 1, jnp.float32),
}


@pytest.mark.parametrize("name", VALUES)
def test_structure_does_not_depend_on_the_leaves(name):
    value = VALUES[name]
    leaves, structure = jax.tree.flatten(value)
    objects = jax.tree.map(lambda _: object(), value)
    assert jax.tree.structure(objects) == structure
    restored = jax.tree.unflatten(jax.tree.structure(objects), leaves)
    assert type(restored) is type(value) and jax.tree.structure(restored) == structure
    for change in (jnp.asarray, lambda _: 0, lambda _: "text", np.shape):
        mapped = jax.tree.map(change, value)
        assert jax.tree.structure(mapped, is_leaf=lambda x: isinstance(x, tuple)) == structure
    assert jax.tree.structure(jax.eval_shape(lambda x: x, value)) == structure
    if isinstance(value, PairwiseFn):
        assert jax.tree.structure(value.map_arrays(lambda x, dims: object())) == structure


@pytest.mark.parametrize("name", CASES)
def test_masks_of_arrays_in_place_of_numbers_allow_the_same_pairs(name):
    mask, _, queries = CASES[name]()
    as_arrays = jax.tree.map(jnp.asarray, mask)
    pairs = [x.materialize(queries, S, B, H) for x in (mask, as_arrays)]
    np.testing.assert_array_equal(*pairs)


def test_map_changes_leaves_and_no_static_field():
    doubled = jax.tree.map(lambda x: x * 2, causal(3) & window(5, 1, offset=1))
    assert doubled.left.offset == 6
    assert dataclasses.astuple(doubled.right) == (5, 1, 2)


def test_vmap_over_offsets():
    arrays = qkv(0, t=4, s=6)
    offsets = jnp.arange(3)
    run = jax.vmap(lambda mask: attend(*arrays, mask=mask & window(2), backend="blockwise"))
    got = run(jax.vmap(causal)(offsets))
    for n in range(3):
        expected = attend(*arrays, mask=causal(n) & window(2), backend="reference")
        np.testing.assert_allclose(got[n], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make", [causal, lambda n: prefix(2, n), lambda n: window(1, 0, n), lambda n: shift_mask(causal(), n)]
)
def test_scan_carries_a_mask(make):
    arrays = qkv(0, t=3, s=6)

    def step(mask, _):
        out = attend(*arrays, mask=mask, backend="blockwise")
        return jax.tree.map(lambda x: x + 1, mask), out

    start = make(1)
    last, outputs = jax.lax.scan(step, start, length=2)
    assert jax.tree.structure(last) == jax.tree.structure(start)
    for n in range(2):
        mask = jax.tree.map(lambda x: x + n, start)  # noqa: B023
        expected = attend(*arrays, mask=mask, backend="reference")
        np.testing.assert_allclose(outputs[n], expected, rtol=1e-5, atol=1e-5)


def test_scan_slices_a_mask():
    arrays = qkv(0, t=3, s=6)
    lengths = jnp.array([[2, 5], [6, 1]])
    stacked = key_lengths(lengths[0]) & sinks_and_window(1, 2, offset=0)
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), stacked)
    stacked = dataclasses.replace(stacked, left=dataclasses.replace(stacked.left, keys=lengths))
    _, outputs = jax.lax.scan(lambda _, mask: (None, attend(*arrays, mask=mask)), None, stacked)
    for n in range(2):
        expected = attend(*arrays, mask=key_lengths(lengths[n]) & sinks_and_window(1, 2))
        np.testing.assert_allclose(outputs[n], expected, rtol=1e-5, atol=1e-5)


def test_learned_softcap_has_a_gradient_on_every_backend():
    arrays = qkv(0)
    got, expected = (
        jax.grad(lambda cap: attend(*arrays, score=softcap(cap), backend=name).sum())(jnp.float32(3.0))  # noqa: B023
        for name in ("blockwise", "reference")
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert expected != 0


def test_per_head_merges_equal_masks():
    mask = per_head([causal(1000), chunked(2), causal(1000), causal(7)])
    assert mask.mask_of_head == (0, 1, 0, 2)


def test_functions_with_the_same_operations_have_the_same_structure():
    def make(n):
        return mask_fn(lambda b, h, q, k: jnp.where(q > n, q - k > n, k == q))

    assert jax.tree.structure(make(1)) == jax.tree.structure(make(1)) != jax.tree.structure(make(2))


@pytest.mark.parametrize("name", CASES)
def test_bounds_leave_no_allowed_pair_out(name):
    mask, _, queries = CASES[name]()
    grid, allowed = BlockGrid(queries, S, 2, 3, B, H), expected_mask(name)
    bounds = mask.kv_bounds(grid)
    if bounds is None:
        return
    first, end = (np.asarray(x)[np.arange(queries) // 2, None] for x in bounds)
    keys = np.arange(S)[None]
    outside = (keys < first) | (keys >= end)
    assert not (allowed & outside).any()


@pytest.mark.parametrize("name", CASES)
def test_summary_of_a_band_is_that_of_all_blocks(name):
    mask, _, queries = CASES[name]()
    grid = BlockGrid(queries, S, 2, 3, B, H)
    count, width = grid.num_blocks
    first = np.arange(count) % (width - 1)
    band = summarize_blocks(mask, grid._replace(band=(2, first)))
    for part, whole in zip(band, mask.block_summary(grid), strict=True):
        whole = np.broadcast_to(whole, (*np.shape(whole)[:2], count, width))
        columns = np.broadcast_to((first[:, None] + np.arange(2))[None, None], (*whole.shape[:3], 2))
        expected = np.take_along_axis(whole, columns, axis=3)
        np.testing.assert_array_equal(np.broadcast_to(part, expected.shape), expected)


def test_traced_parts_are_looked_at_within_the_bounds_of_static_parts():
    """Traced segments are summarized only in the band that the static window leaves."""

    ids, grid = jnp.ones((1, 4096), jnp.int32), BlockGrid(4096, 4096, 64, 64)

    @jax.jit
    def widths(ids):
        block_mask = make_block_mask(causal() & window(100) & segments(ids), grid)
        return block_mask.kv_indices[0, 0], block_mask.kv_num_blocks[0, 0]

    indices, counts = widths(ids)
    assert indices.shape == (64, 3)
    np.testing.assert_array_equal(counts, np.minimum(np.arange(64) + 1, 3))
    np.testing.assert_array_equal(np.sort(indices[5]), [3, 4, 5])


def test_masks_without_bounds_keep_all_blocks():
    grid = BlockGrid(64, 64, 8, 8)
    for mask in (None, ~window(3), causal() | mask_fn(lambda b, h, q, k: k == 60), key_lengths(60)):
        assert restrict_to_bounds(grid, mask).band is None
    assert restrict_to_bounds(grid, window(3, 0) | window(0, 3)).band is not None
