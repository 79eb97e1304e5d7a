"""The base class of masks, and masks composed by `&`, `|`, `~`, `per_head` and `shift_mask`.

A mask defines which (query, key) pairs may attend. `evaluate` computes any block of it, so that
backends evaluate only the blocks they visit, and `block_summary` reports in advance which blocks
are empty, which are full, and which must be evaluated. Concrete masks are in `basic.py`,
`intervals.py`, `sparse.py` and `grids.py`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.arrays import check_array, check_function, check_index, describe, is_array
from attnlab.attention.masks.counts import count_pairs, map_query_blocks
from attnlab.attention.pairwise import (
    BlockGrid,
    BlockSummary,
    Index,
    KVBounds,
    PairIndices,
    PairwiseFn,
    pair_indices,
    pytree,
    static,
    summarize_blocks,
    union_bounds,
)
from attnlab.attention.traced_fn import TracedFn
from attnlab.errors import InputError


class Mask(PairwiseFn):
    """Base class of masks.

    Subclasses implement `evaluate`, and `block_summary` where it can be computed without evaluating
    every pair.
    """

    def evaluate(self, at: PairIndices) -> Bool[Array, "B H T S"]:
        """Return which of these pairs may attend, in a shape that broadcasts to (B, H, T, S).

        The arrays of the mask have already been sliced to the same pairs; see `PairwiseFn.dims`.
        """
        raise NotImplementedError

    def kv_bounds(self, grid: BlockGrid) -> KVBounds | None:
        """Return bounds on the keys of each block of queries, or None if they are not known.

        Pairs outside the bounds must be masked in every batch row and head. The bounds are global
        key indices.
        """
        del grid
        return None

    def count_per_block(self, at: PairIndices, block_kv: int, end: Index) -> Int[Array, "B H T N"]:
        """Return how many keys of each block, before key `end`, a query may attend to.

        This default evaluates every pair.
        """
        allowed = self.evaluate(at) & (at.kv < end)
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:3], at.kv.shape[-1]))
        padding = -at.kv.shape[-1] % block_kv
        allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, padding)])
        return allowed.reshape(*allowed.shape[:3], -1, block_kv).sum(-1)

    def block_summary(self, grid: BlockGrid) -> BlockSummary:
        """Return bounds on each block of the grid; see `BlockSummary`.

        This default is exact, and computed from `count_per_block`.
        """
        sizes = np.minimum(grid.block_kv, grid.num_keys - grid.kv_blocks * grid.block_kv)

        def summarize(counts, is_query, i):
            size = jnp.asarray(sizes)[None, None, i if len(sizes) > 1 else 0][:, :, None]
            return (is_query & (counts > 0)).any(2), (~is_query | (counts == size)).all(2)

        any_allowed, all_allowed = map_query_blocks(self, grid, summarize)
        return BlockSummary(jnp.moveaxis(any_allowed, 0, 2), jnp.moveaxis(all_allowed, 0, 2))

    def materialize(
        self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1
    ) -> Bool[Array, "B H T S"]:
        """Return the mask as one boolean array.

        The dimensions of batch and heads may be 1 if the mask does not depend on them.
        """
        allowed = self.evaluate(pair_indices(batch, heads, num_queries, num_keys))
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], num_queries, num_keys))

    def density(self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1) -> float:
        """Return the exact fraction of allowed pairs. Pairs of partial blocks are evaluated."""
        return count_pairs(self, num_queries, num_keys, batch, heads) / (num_queries * num_keys)

    def draw(self, num_queries: int, num_keys: int, row: int = 0, head: int = 0) -> str:
        """Return the mask as text, one line per query: `x` is an allowed key, `.` a masked one."""
        allowed = np.asarray(self.materialize(num_queries, num_keys, row + 1, head + 1))
        lines = allowed[min(row, len(allowed) - 1), min(head, allowed.shape[1] - 1)]
        return "\n".join(" ".join("x" if pair else "." for pair in line) for line in lines)

    def __and__(self, other: "Mask") -> "Mask":
        return AndMask(self, as_mask(other))

    def __or__(self, other: "Mask") -> "Mask":
        return OrMask(self, as_mask(other))

    def __invert__(self) -> "Mask":
        return NotMask(self)

    __rand__, __ror__ = __and__, __or__
    __array_ufunc__ = None  # so that NumPy defers `array & mask` to `Mask.__rand__`


class CountingMask(Mask):
    """Base class of masks that count the allowed keys of a query without evaluating each pair."""

    def count_before(self, at: PairIndices) -> Int[Array, "B H T S"]:
        """Return how many keys before each of `at.kv` are allowed, plus a constant per query."""
        raise NotImplementedError

    def count_per_block(self, at, block_kv, end):
        """See `Mask.count_per_block`: differences of `count_before` between the block edges."""
        edges = jnp.concatenate([at.kv[..., ::block_kv], at.kv[..., -1:] + 1], axis=-1)
        return jnp.diff(self.count_before(at._replace(kv=jnp.minimum(edges, end))), axis=-1)


@pytree
class AndMask(Mask):
    """The pairs that both masks allow."""

    left: Mask
    right: Mask

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self.left.evaluate(at) & self.right.evaluate(at)

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        a, b = summarize_blocks(self.left, grid), summarize_blocks(self.right, grid)
        return BlockSummary(a.any_allowed & b.any_allowed, a.all_allowed & b.all_allowed)

    def kv_bounds(self, grid):
        """See `Mask.kv_bounds`."""
        a, b = self.left.kv_bounds(grid), self.right.kv_bounds(grid)
        if a is None or b is None:
            return a or b
        return np.maximum(a[0], b[0]), np.minimum(a[1], b[1])


@pytree
class OrMask(Mask):
    """The pairs that at least one of two masks allows."""

    left: Mask
    right: Mask

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self.left.evaluate(at) | self.right.evaluate(at)

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        a, b = summarize_blocks(self.left, grid), summarize_blocks(self.right, grid)
        return BlockSummary(a.any_allowed | b.any_allowed, a.all_allowed | b.all_allowed)

    def kv_bounds(self, grid):
        """See `Mask.kv_bounds`."""
        return union_bounds([self.left.kv_bounds(grid), self.right.kv_bounds(grid)])


@pytree
class NotMask(Mask):
    """The pairs that a mask does not allow."""

    mask: Mask

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return ~self.mask.evaluate(at)

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        summary = summarize_blocks(self.mask, grid)
        return BlockSummary(~summary.all_allowed, ~summary.any_allowed)


@pytree
class PerHeadMask(Mask):
    """A separate mask for each query head.

    Attributes:
      masks: the distinct masks.
      mask_of_head: index into `masks` for each head.
    """

    masks: list[Mask]
    mask_of_head: tuple[int, ...] = static()

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self._select(at.h, [mask.evaluate(at) for mask in self.masks])

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        heads = jnp.reshape(grid.offset[1] + jnp.arange(grid.heads), (1, -1, 1, 1))
        summaries = [summarize_blocks(mask, grid) for mask in self.masks]
        return BlockSummary(*(self._select(heads, parts) for parts in zip(*summaries, strict=True)))

    def kv_bounds(self, grid):
        """See `Mask.kv_bounds`."""
        return union_bounds([mask.kv_bounds(grid) for mask in self.masks])

    def _select(self, heads, parts):
        """Return, for each head, the part that belongs to its mask."""
        index = jnp.asarray(self.mask_of_head)[heads]
        return functools.reduce(operator.or_, ((index == i) & part for i, part in enumerate(parts)))


@pytree
class ShiftedMask(Mask):
    """A mask whose indices start at key `offset` of each row; earlier keys are masked.

    Attributes:
      mask: the mask to shift.
      offset: key index that becomes index 0 of `mask`, a number or (B,).
    """

    mask: Mask
    offset: Index

    dims = {"offset": ("batch",)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        at = self._shift(at)
        return self.mask.evaluate(at) & (at.kv >= 0)

    def count_per_block(self, at, block_kv, end):
        """See `Mask.count_per_block`."""
        if isinstance(self.mask, CountingMask):
            return CountingMask.count_per_block(self, at, block_kv, end)  # type: ignore[arg-type]
        return super().count_per_block(at, block_kv, end)

    def count_before(self, at):
        """See `CountingMask.count_before`: keys before the offset count 0."""
        at = self._shift(at)
        return self.mask.count_before(at._replace(kv=jnp.maximum(at.kv, 0)))

    def _shift(self, at: PairIndices) -> PairIndices:
        offset = jnp.reshape(self.offset, (-1, 1, 1, 1))
        return at._replace(q=at.q - offset, kv=at.kv - offset)


@pytree
class DenseMask(Mask):
    """A boolean array of the allowed pairs; its batch and head dimensions may be 1."""

    allowed: Bool[Array, "B H T S"]

    dims = {"allowed": ("batch", "heads", "queries", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return jnp.asarray(self.allowed)


@pytree
class MaskFn(Mask):
    """A user-defined function of the indices of one pair; see `mask_fn`."""

    function: TracedFn = static()
    captured: Any

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self.function(self.captured, at.b, at.h, at.q, at.kv)


def mask_fn(function: Callable[[Array, Array, Array, Array], Array]) -> Mask:
    """Return the mask that allows query q to attend to key k where `function(b, h, q, k)` is true.

    b is the batch row and h the query head. The function is traced once with scalars. Arrays that
    it captures are replicated on every device.

    Raises:
      InputError: the function does not take four indices, or does not return one boolean.
    """
    if not callable(function):
        raise InputError(f"mask_fn takes a function of (b, h, q, k), not {describe(function)}")
    check_function(function, "a mask function", "b, h, q, k")
    return MaskFn(*TracedFn.trace(function, [jnp.int32(0)] * 4, "a mask function", jnp.bool_))


def per_head(masks: Sequence[Any]) -> Mask:
    """Return the mask that applies a separate mask to each query head.

    Masks of the same structure that hold the same arrays are evaluated once.

    Raises:
      InputError: `masks` is empty or not a sequence. `attend` also raises it if the number of masks
        is not the number of query heads.
    """
    if not isinstance(masks, list | tuple) or not masks:
        raise InputError(f"per_head takes a list of one mask per query head, not {describe(masks)}")
    masks = [as_mask(mask) for mask in masks]

    def identity(leaf):
        return (type(leaf), leaf) if isinstance(leaf, int | float) else id(leaf)

    keys = [(jax.tree.structure(mask), *map(identity, jax.tree.leaves(mask))) for mask in masks]
    distinct = dict(zip(keys, masks, strict=True))
    return PerHeadMask(list(distinct.values()), tuple(list(distinct).index(key) for key in keys))


def shift_mask(mask: Any, offset: Index | Int[Array, " B"]) -> Mask:
    """Return `mask` with query and key indices counted from key `offset` of each row.

    Use it for left padding. Keys before the offset are masked.

    Raises:
      InputError: the offset is not an integer, or the mask holds an array with one entry per query
        or key, which cannot be shifted.
    """
    check_index("shift_mask", 1, offset=offset)

    def check(x, dims):
        for name, n in zip(dims, jnp.shape(x), strict=True):
            if name in ("queries", "keys") and n > 1:
                raise InputError(f"shift_mask: cannot shift a mask that holds an array over its {n} {name}")
        return x

    offset = offset if isinstance(offset, int) else jnp.reshape(offset, (-1,))

    def shift(mask):
        # Shift each operand separately, so that it keeps its own `block_summary`.
        match mask:
            case AndMask() | OrMask():
                return type(mask)(shift(mask.left), shift(mask.right))
        return ShiftedMask(mask, offset)

    return shift(as_mask(mask).map_arrays(check))


def as_mask(value: Any) -> Mask:
    """Return `value` as a mask: a mask, a boolean array of at most 4 dimensions, or a function.

    Raises:
      InputError: `value` is anything else, such as an additive mask or a mask of 0 and 1.
    """
    if isinstance(value, Mask):
        return value
    if isinstance(value, PairwiseFn):
        raise InputError(f"a mask is needed, and {type(value).__name__} is a score: pass it as score=")
    if callable(value):
        return mask_fn(value)
    if not is_array(value) and isinstance(value, list | tuple):
        value = _as_array(value)
    if not is_array(value) or isinstance(value, np.bool_):
        raise InputError(f"a mask must be a Mask, a boolean array or a function, not {describe(value)}")
    if value.dtype != bool:
        raise InputError(
            f"a mask must be boolean, True where a query attends to a key; got {describe(value)}. Pass "
            "mask == 1 for a mask of 0 and 1, and mask == 0 or score=bias(mask) for an additive mask"
        )
    check_array("a mask", value, "boolean", range(5))
    return DenseMask(value.reshape(*(1,) * (4 - value.ndim), *value.shape))


def _as_array(value: list | tuple) -> np.ndarray:
    """Return nested lists of booleans as an array."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):  # ragged lists, masks, tracers
        array = np.array(None)
    if array.dtype.kind == "b":
        return array
    raise InputError(
        "a list is a mask only if it holds nested lists of booleans; combine masks with & or |, and pass "
        f"one mask per head with per_head; got {describe(value)}"
    )
