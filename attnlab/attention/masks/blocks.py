"""Grids of blocks of scores, and bounds on the blocks of a mask."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.pairwise import block_indices

Index = int | Int[Array, ""]
BlockOffset = tuple[Index, Index, Index, Index]  # batch row, head, query, key
# The first allowed key and the end (exclusive) of the allowed keys of each block of queries.
KVBounds = tuple[np.ndarray, np.ndarray]


class BlockSummary(NamedTuple):
    """Bounds on each block of a mask, each (B or 1, H or 1, query blocks, key blocks).

    Attributes:
      any_allowed: False if no pair of the block is allowed; True if some pair may be.
      all_allowed: True if every pair of the block is allowed; False if some pair may not be.
    """

    any_allowed: Bool[Array, "B H Q S"]
    all_allowed: Bool[Array, "B H Q S"]


class BlockGrid(NamedTuple):
    """A grid of blocks of `block_q` queries by `block_kv` keys that covers a part of the scores.

    The last blocks may be smaller.

    Attributes:
      num_queries: number of queries.
      num_keys: number of keys.
      block_q: queries of a block.
      block_kv: keys of a block.
      batch: number of batch rows.
      heads: number of query heads.
      offset: global index of the first batch row, head, query and key.
      band: restricts the grid to a band of consecutive kv blocks of each block of queries: their
        number, and the first one of each block of queries. None for all kv blocks. The last
        dimension of a `BlockSummary` then counts the blocks of the band.
    """

    num_queries: int
    num_keys: int
    block_q: int
    block_kv: int
    batch: int = 1
    heads: int = 1
    offset: BlockOffset = (0, 0, 0, 0)
    band: tuple[int, np.ndarray] | None = None

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Number of blocks along queries, and along keys."""
        return -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_kv)

    @property
    def kv_blocks(self) -> np.ndarray:
        """Indices of the kv blocks, (1, all kv blocks) or (query blocks, blocks of the band)."""
        if self.band is None:
            return np.arange(self.num_blocks[1])[None]
        width, first = self.band
        return first[:, None] + np.arange(width)

    @property
    def block_areas(self) -> np.ndarray:
        """Number of pairs of each block, (query blocks, all kv blocks or those of the band)."""
        q = np.arange(0, self.num_queries, self.block_q)[:, None]
        kv = self.kv_blocks * self.block_kv
        rows, columns = self.num_queries - q, self.num_keys - kv
        return np.minimum(rows, self.block_q) * np.minimum(columns, self.block_kv)

    def take_kv_blocks(self, x: Array) -> Array:
        """Return values per kv block, (..., all kv blocks), as (..., 1 or query blocks, blocks)."""
        return x[..., None, :] if self.band is None else jnp.asarray(x)[..., self.kv_blocks]


def summarize_blocks(mask: Any, grid: BlockGrid) -> BlockSummary:
    """Return `mask.block_summary(grid)`, also if the mask ignores the band of the grid."""
    summary = mask.block_summary(grid)
    if grid.band is None or summary.any_allowed.shape[-1] == grid.band[0]:
        return summary
    index = jnp.asarray(grid.kv_blocks)[None, None]
    return BlockSummary(*(jnp.take_along_axis(x, index, axis=3) for x in summary))


def restrict_to_bounds(grid: BlockGrid, mask: Any) -> BlockGrid:
    """Return the grid with a band of the kv blocks that the bounds of a static mask leave.

    All kv blocks stay if the bounds leave most of them.
    """
    bounds = None if mask is None else mask.kv_bounds(grid)
    if bounds is None:
        return grid
    first, end = (np.clip(np.asarray(x) - int(grid.offset[3]), 0, grid.num_keys) for x in bounds)
    first, end = first // grid.block_kv, -(-end // grid.block_kv)
    width = max(1, (end - first).max().item())
    if 2 * width > grid.num_blocks[1]:
        return grid
    return grid._replace(band=(width, np.minimum(first, grid.num_blocks[1] - width)))


def union_bounds(bounds: Sequence[KVBounds | None]) -> KVBounds | None:
    """Return bounds that hold for each of several masks."""
    known = [x for x in bounds if x is not None]
    if len(known) < len(bounds):
        return None
    firsts, ends = zip(*known, strict=True)
    return reduce(np.minimum, firsts), reduce(np.maximum, ends)


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
