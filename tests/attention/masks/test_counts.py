"""Counts of allowed pairs, against dense masks and, for long windows, a formula."""

import numpy as np
import pytest

from attnlab.attention import causal, window
from attnlab.attention.block_mask import make_block_mask
from attnlab.attention.masks.counts import _count_in_blocks, count_pairs
from attnlab.attention.pairwise import BlockGrid
from tests.attention.definitions import CASES, B, H, S, expected_mask


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
