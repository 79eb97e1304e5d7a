"""Counts of the pairs that a mask allows, per block of a grid and in all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention.pairwise import (
    BlockGrid,
    block_indices,
    restrict_to_bounds,
    summarize_blocks,
)


def map_query_blocks(mask: Any, grid: BlockGrid, summarize: Callable[[Array, Array, Array], Any]) -> Any:
    """Return `summarize(counts, is_query, i)` of each block i of queries, on a new axis 0.

    `counts` is `count_per_block` of the block; `is_query` is False for padding queries.
    """
    count, width = grid.num_blocks
    padded, length = mask.pad_to(queries=count * grid.block_q), grid.num_keys
    if grid.band is not None:
        padded, length = padded.pad_to(keys=width * grid.block_kv), grid.band[0] * grid.block_kv

    def query_block(i):
        b, h, q, k = grid.offset
        first = 0 if grid.band is None else jnp.asarray(grid.band[1])[i] * grid.block_kv
        shape = grid.batch, grid.heads, grid.block_q, length
        at = block_indices((b, h, q + i * grid.block_q, k + first), shape)
        part = padded.slice_block(queries=(i * grid.block_q, grid.block_q))
        if grid.band is not None:
            part = part.slice_block(keys=(first, length))
        counts = part.count_per_block(at, grid.block_kv, k + grid.num_keys)
        return summarize(counts, at.q - q < grid.num_queries, i)

    return jax.lax.map(query_block, jnp.arange(count))


def count_pairs(mask: Any, num_queries: int, num_keys: int, batch: int, heads: int) -> float:
    """Return the number of allowed pairs, as the mean over batch rows and heads."""
    if hasattr(mask, "count_before") or num_queries * num_keys * batch * heads <= 2**22:
        rows = max(1, min(num_queries, 2**22 // max(1, num_keys * batch * heads)))
        grid = BlockGrid(num_queries, num_keys, rows, num_keys, batch, heads)

        def count(counts, is_query, i):
            del i
            return jnp.where(is_query, counts, 0).sum(2)

        return _sum_of_means(map_query_blocks(mask, grid, count))
    grid = restrict_to_bounds(BlockGrid(num_queries, num_keys, 128, 512, batch, heads), mask)
    any_allowed, all_allowed = map(np.asarray, summarize_blocks(mask, grid))
    full = all_allowed.all((0, 1))
    q_blocks, index = np.nonzero(any_allowed.any((0, 1)) & ~full)
    total = grid.block_areas[full].sum(dtype=np.int64).item()
    if not q_blocks.size:
        return total
    kv_blocks = np.broadcast_to(grid.kv_blocks, full.shape)[q_blocks, index]
    return total + _sum_of_means(_count_in_blocks(mask, grid, q_blocks, kv_blocks))


def _sum_of_means(counts: Array) -> float:
    """Return the sum of counts, (blocks, B, H, ...), as the mean over batch rows and heads."""
    total = np.asarray(counts).sum(dtype=np.int64).item()
    return total / (counts.shape[1] * counts.shape[2])


def _count_in_blocks(mask: Any, grid: BlockGrid, q_blocks: np.ndarray, kv_blocks: np.ndarray) -> Array:
    """Return the number of allowed pairs of these blocks of the grid, (blocks, B, H)."""
    count, width = grid.num_blocks
    padded = mask.pad_to(queries=count * grid.block_q, keys=width * grid.block_kv)

    def count_block(block):
        q, k = block[0] * grid.block_q, block[1] * grid.block_kv
        at = block_indices((0, 0, q, k), (grid.batch, grid.heads, grid.block_q, grid.block_kv))
        part = padded.slice_block(queries=(q, grid.block_q), keys=(k, grid.block_kv))
        inside = (at.q < grid.num_queries) & (at.kv < grid.num_keys)
        return (part.evaluate(at) & inside).sum((2, 3))

    return jax.lax.map(count_block, (jnp.asarray(q_blocks), jnp.asarray(kv_blocks)))
