"""Which blocks of a mask a backend visits, and in what order: known when compiled, or found when run."""

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
    """For each block of queries, the blocks of keys that it attends to in any batch row and head.

    A full block allows every pair, a partial block some of them and needs the mask.

    Attributes:
      kv_indices: indices of kv blocks, (q blocks, kv blocks), full blocks first, then partial ones; entries
        from `kv_num_blocks` on are undefined.
      full_kv_num_blocks: how many of the first `kv_indices` are full.
      kv_num_blocks: how many of the first `kv_indices` are full or partial. FlexAttention counts only the
        partial ones in this field.
    """

    kv_indices: Int[Array, "Q S"]
    full_kv_num_blocks: Int[Array, " Q"]
    kv_num_blocks: Int[Array, " Q"]


@dataclass(frozen=True)
class StaticBlockInfo:
    """What is known of a block mask when the program is compiled.

    Attributes:
      has_full: whether some block may need no mask.
      has_partial: whether some block may need one.
      unrolled: where blocks are few, for each block of queries its (block of keys, needs the mask).
    """

    has_full: bool = True
    has_partial: bool = True
    unrolled: tuple[tuple[tuple[int, bool], ...], ...] | None = None


# A program of so many blocks written out compiles quickly and runs faster than loops, as long as the memory
# of so many scores, all of which it may hold at once, is nothing.
FEW_BLOCKS, FEW_SCORES = 24, 2**22


def even_block_size(length: int, max_size: int) -> int:
    """The size of equal parts that are at most so long."""
    return -(-length // -(-length // max_size))


def is_static(tree) -> bool:
    """Return whether no array in the tree is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def make_block_mask(mask: Mask | None, grid: BlockGrid) -> tuple[BlockMask, StaticBlockInfo]:
    """The block mask of a mask over a grid, computed here and now as far as the mask is known.

    What is known only when run, such as segments, is left out of account where that leaves few blocks;
    where it leaves many, the whole block mask is found when run.
    """
    part, whole = static_part(mask, grid)
    if whole or (part is not None and is_static(grid.offset[2:])):
        any_allowed, all_allowed = eval_at_trace_time(
            lambda: _summarize(part, grid._replace(offset=(0, 0, *grid.offset[2:])))
        )
        all_allowed = all_allowed & whole
        unrolled = _unrolled_kv_blocks(any_allowed, all_allowed, grid)
        if whole or unrolled is not None:
            has_partial = bool((any_allowed & ~all_allowed).any())
            info = StaticBlockInfo(bool(all_allowed.any()), has_partial, unrolled)
            return _sort_blocks(np, any_allowed, all_allowed), info
    return _sort_blocks(jnp, *_summarize(mask, grid)), StaticBlockInfo()


def static_part(mask: Mask | None, grid: BlockGrid) -> tuple[Mask | None, bool]:
    """The part of a conjunction that is known when compiled, and whether that is all of it."""
    if mask is None:
        return None, is_static(grid.offset[2:])
    if isinstance(mask, AndMask):
        sides = static_part(mask.left, grid), static_part(mask.right, grid)
        if all(whole for _, whole in sides):
            return mask, True
        parts = [part for part, _ in sides if part is not None]
        return (reduce(AndMask, parts) if parts else None), False
    by_place = not is_static(grid.offset[:2]) and any(depends_on_batch_and_heads(mask))
    if by_place or not is_static((mask, grid.offset[2:])):
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
    """Of each block: whether some row of the batch or head needs it, and whether none needs a mask for it."""
    count, width = grid.num_blocks
    any_allowed: Any = np.ones((count, width), bool)
    all_allowed: Any = any_allowed
    if mask is not None:
        any_allowed, all_allowed = mask.block_summary(grid)
        any_allowed, all_allowed = any_allowed.any((0, 1)), all_allowed.all((0, 1))
    if grid.num_keys % grid.block_kv:  # what fills up the last block is not to be attended to
        all_allowed = all_allowed & (np.arange(width) < width - 1)[None]
    return any_allowed, all_allowed & any_allowed


def _sort_blocks(np_, any_allowed, all_allowed) -> BlockMask:
    # Sorting by 0, 1, 2 keeps the order of the keys within each sort.
    rank = np_.where(all_allowed, 0, np_.where(any_allowed, 1, 2))
    kv_indices = np_.argsort(rank, axis=1, **({"kind": "stable"} if np_ is np else {"stable": True}))
    return BlockMask(kv_indices.astype(np_.int32), all_allowed.sum(1), any_allowed.sum(1))
