"""Which tiles of a mask a backend visits, and in what order: known when compiled, or found when run."""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnlab.attention.masks.base import AndMask, BlockGrid, Mask
from attnlab.attention.pairwise import eval_at_trace_time, pair_indices


class Plan(NamedTuple):
    """For each tile of queries, the tiles of keys that it meets: those that need no mask, then the others.

    Attributes:
      order: numbers of key tiles, (query tiles, key tiles); what lies beyond `visited` means nothing.
      unmasked: how many of them, from the first, allow every pair.
      visited: how many of them may allow some.
    """

    order: Int[Array, "Q S"]
    unmasked: Int[Array, " Q"]
    visited: Int[Array, " Q"]


@dataclass(frozen=True)
class Known:
    """What is known of a plan when the program is compiled.

    Attributes:
      unmasked: whether some tile may need no mask.
      masked: whether some tile may need one.
      visits: where they are few, for each tile of queries its key tiles, and whether they need the mask.
    """

    unmasked: bool = True
    masked: bool = True
    visits: tuple[tuple[tuple[int, bool], ...], ...] | None = None


# A program of so many tiles written out compiles quickly and runs faster than loops, as long as the memory
# of so many scores, all of which it may hold at once, is nothing.
FEW_TILES, FEW_SCORES = 24, 2**22


def equal_part(length: int, most: int) -> int:
    """The size of equal parts that are at most so long."""
    return -(-length // -(-length // most))


def is_traced(tree) -> bool:
    """Whether any array of it is known only when run."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def plan(mask: Mask | None, grid: BlockGrid) -> tuple[Plan, Known]:
    """The plan of a mask over a grid, computed here and now as far as the mask is known.

    What is known only when run, such as segments, is left out of account where that leaves few tiles;
    where it leaves many, the whole plan is found when run.
    """
    part, whole = known_part(mask, grid)
    if whole or (part is not None and not is_traced(grid.offset[2:])):
        some, every = eval_at_trace_time(lambda: _sorts(part, grid._replace(offset=(0, 0, *grid.offset[2:]))))
        every = every & whole
        visits = _written_out(some, every, grid)
        if whole or visits is not None:
            return _plan(np, some, every), Known(bool(every.any()), bool((some & ~every).any()), visits)
    return _plan(jnp, *_sorts(mask, grid)), Known()


def known_part(mask: Mask | None, grid: BlockGrid) -> tuple[Mask | None, bool]:
    """The part of a conjunction that is known when compiled, and whether that is all of it."""
    if mask is None:
        return None, not is_traced(grid.offset[2:])
    if isinstance(mask, AndMask):
        sides = known_part(mask.left, grid), known_part(mask.right, grid)
        if all(whole for _, whole in sides):
            return mask, True
        parts = [part for part, _ in sides if part is not None]
        return (reduce(AndMask, parts) if parts else None), False
    by_place = is_traced(grid.offset[:2]) and any(depends_on(mask))
    if by_place or is_traced((mask, grid.offset[2:])):
        return None, False
    return mask, True


def depends_on(mask: Mask) -> tuple[bool, bool]:
    """Whether a mask differs between rows of the batch, and between heads."""
    # Two of each, so that a function of their index shows it.
    two, one = (0, 2), (0, 1)
    ranges = {"batch": two, "heads": two, "queries": one, "keys": one}
    corner = jax.eval_shape(lambda: mask.slice_block(**ranges).evaluate(pair_indices(2, 2, 1, 1)))
    return corner.shape[0] > 1, corner.shape[1] > 1


def _written_out(some, every, grid: BlockGrid):
    scores = some.sum() * grid.block_q * grid.block_kv * grid.batch * grid.heads
    if some.sum() > FEW_TILES or scores > FEW_SCORES:
        return None
    return tuple(tuple((int(j), not every[i, j]) for j in np.flatnonzero(some[i])) for i in range(len(some)))


def _sorts(mask: Mask | None, grid: BlockGrid):
    """Of each tile: whether some row of the batch or head needs it, and whether none needs a mask for it."""
    count, width = grid.num_blocks
    some: Any = np.ones((count, width), bool)
    every: Any = some
    if mask is not None:
        some, every = mask.block_summary(grid)
        some, every = some.any((0, 1)), every.all((0, 1))
    if grid.num_keys % grid.block_kv:  # what fills up the last tile is not to be attended to
        every = every & (np.arange(width) < width - 1)[None]
    return some, every & some


def _plan(np_, some, every) -> Plan:
    # Sorting by 0, 1, 2 keeps the order of the keys within each sort.
    rank = np_.where(every, 0, np_.where(some, 1, 2))
    order = np_.argsort(rank, axis=1, **({"kind": "stable"} if np_ is np else {"stable": True}))
    return Plan(order.astype(np_.int32), every.sum(1), some.sum(1))
