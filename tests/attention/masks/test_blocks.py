"""Bounds on the keys of blocks of queries, bands of blocks, and counts of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import causal, key_lengths, mask_fn, segments, window
from attnlab.attention.block_mask import make_block_mask
from attnlab.attention.masks.blocks import (
    BlockGrid,
    _count_in_blocks,
    count_pairs,
    restrict_to_bounds,
    summarize_blocks,
)
from tests.attention.definitions import CASES, B, H, S, expected_mask


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


@pytest.mark.parametrize("name", list(CASES)[::4])
def test_pairs_of_partial_blocks_are_counted(name):
    mask, _, queries = CASES[name]()
    grid = BlockGrid(queries, S, 2, 3, B, H)
    q_blocks, kv_blocks = np.indices(grid.num_blocks).reshape(2, -1)
    counts = np.asarray(_count_in_blocks(mask, grid, q_blocks, kv_blocks))
    total = counts.sum() * (B * H) / (counts.shape[1] * counts.shape[2])
    assert total == np.broadcast_to(expected_mask(name), (B, H, queries, S)).sum()


def test_long_windows_visit_few_blocks():
    """Time and memory are linear in the visited blocks: 2^20 tokens have 2^23 blocks."""
    n, left = 2**20, 1024
    mask = causal() & window(left)
    block_mask = make_block_mask(mask, BlockGrid(n, n, 256, 512))
    assert block_mask.kv_indices.shape == (1, 1, n // 256, 3)
    assert block_mask.info.has_full and block_mask.info.has_partial
    visited = [(256 * i + 255) // 512 - max(0, 256 * i - left) // 512 + 1 for i in range(n // 256)]
    counts = block_mask.kv_num_blocks + block_mask.full_kv_num_blocks
    np.testing.assert_array_equal(counts[0, 0], visited)
    assert count_pairs(mask, 2**15, 2**15, 1, 1) == 2**15 * (left + 1) - left * (left + 1) // 2


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
