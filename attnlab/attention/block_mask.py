"""Block masks: the blocks that a backend visits, computed at trace time or at run time."""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnlab.attention.masks.base import AndMask, BlockGrid, Mask, depends_on_batch_and_heads
from attnlab.attention.pairwise import eval_at_trace_time


class BlockMask(NamedTuple):
    """The blocks of keys that each block of queries attends to, in any batch row or head.

    A full block allows every pair. A partial block allows some pairs and needs the mask.

    Attributes:
      kv_indices: indices of kv blocks, (q blocks, kv blocks): full blocks first, then partial
        ones. Entries from `kv_num_blocks` on are undefined.
      full_kv_num_blocks: number of leading `kv_indices` that are full.
      kv_num_blocks: number of leading `kv_indices` that are full or partial. FlexAttention counts
        only the partial ones in this field.
    """

    kv_indices: Int[Array, "Q S"]
    full_kv_num_blocks: Int[Array, " Q"]
    kv_num_blocks: Int[Array, " Q"]


@dataclass(frozen=True)
class StaticBlockInfo:
    """Properties of a block mask that are static.

    Attributes:
      has_full: whether any block may be full.
      has_partial: whether any block may be partial.
      unrolled: for each block of queries, its pairs (kv block, needs the mask), if there are few
        enough blocks to unroll the loop over them. None otherwise.
    """

    has_full: bool = True
    has_partial: bool = True
    unrolled: tuple[tuple[tuple[int, bool], ...], ...] | None = None


# Up to these limits, loops over blocks are unrolled. So few unrolled blocks compile quickly and run
# faster than a loop. XLA may hold the scores of all unrolled blocks at once: 2^22 scores are 16 MiB
# in float32.
FEW_BLOCKS, FEW_SCORES = 24, 2**22


def even_block_size(length: int, max_size: int) -> int:
    """Return the size of the fewest equal parts of `length` that are at most `max_size` long."""
    return -(-length // -(-length // max_size))


def is_static(tree) -> bool:
    """Return whether no array in the tree is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def make_block_mask(mask: Mask | None, grid: BlockGrid) -> tuple[BlockMask, StaticBlockInfo]:
    """Return the block mask of a mask over a grid, computed at trace time where possible.

    Traced parts of the mask, such as segment ids, are ignored when the static part leaves at most
    `FEW_BLOCKS` blocks with at most `FEW_SCORES` scores. Otherwise the block mask is computed at
    run time.
    """
    part, all_static = static_part(mask, grid)
    if all_static or (part is not None and is_static(grid.offset[2:])):
        any_allowed, all_allowed = eval_at_trace_time(
            lambda: _summarize(part, grid._replace(offset=(0, 0, *grid.offset[2:])))
        )
        all_allowed = all_allowed & all_static
        unrolled = _unrolled_kv_blocks(any_allowed, all_allowed, grid)
        if all_static or unrolled is not None:
            has_partial = bool((any_allowed & ~all_allowed).any())
            info = StaticBlockInfo(bool(all_allowed.any()), has_partial, unrolled)
            return _sort_blocks(np, any_allowed, all_allowed), info
    return _sort_blocks(jnp, *_summarize(mask, grid)), StaticBlockInfo()


def static_part(mask: Mask | None, grid: BlockGrid) -> tuple[Mask | None, bool]:
    """Return the static operands of a conjunction, and whether that is the whole mask."""
    if mask is None:
        return None, is_static(grid.offset[2:])
    if isinstance(mask, AndMask):
        sides = static_part(mask.left, grid), static_part(mask.right, grid)
        if all(all_static for _, all_static in sides):
            return mask, True
        parts = [part for part, _ in sides if part is not None]
        return (reduce(AndMask, parts) if parts else None), False
    uses_traced_offset = not is_static(grid.offset[:2]) and any(depends_on_batch_and_heads(mask))
    if uses_traced_offset or not is_static((mask, grid.offset[2:])):
        return None, False
    return mask, True


def _unrolled_kv_blocks(any_allowed, all_allowed, grid: BlockGrid):
    scores = any_allowed.sum() * grid.block_q * grid.block_kv * grid.batch * grid.heads
    if any_allowed.sum() > FEW_BLOCKS or scores > FEW_SCORES:
        return None
    return tuple(
        tuple((int(j), not all_allowed[i, j]) for j in np.flatnonzero(any_allowed[i]))
        for i in range(len(any_allowed))
    )


def _summarize(mask: Mask | None, grid: BlockGrid):
    """Return for each block whether it is nonempty and whether it is full, over rows and heads."""
    count, width = grid.num_blocks
    any_allowed: Any = np.ones((count, width), bool)
    all_allowed: Any = any_allowed
    if mask is not None:
        any_allowed, all_allowed = mask.block_summary(grid)
        any_allowed, all_allowed = any_allowed.any((0, 1)), all_allowed.all((0, 1))
    if grid.num_keys % grid.block_kv:  # the last block is padded, and padding is masked
        all_allowed = all_allowed & (np.arange(width) < width - 1)[None]
    return any_allowed, all_allowed & any_allowed


def _sort_blocks(np_, any_allowed, all_allowed) -> BlockMask:
    # Stable sort: full, partial and empty blocks each stay in the order of their keys.
    rank = np_.where(all_allowed, 0, np_.where(any_allowed, 1, 2))
    kv_indices = np_.argsort(rank, axis=1, **({"kind": "stable"} if np_ is np else {"stable": True}))
    return BlockMask(kv_indices.astype(np_.int32), all_allowed.sum(1), any_allowed.sum(1))
