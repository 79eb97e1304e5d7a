"""The base class of masks, and masks composed by `&`, `|`, `~`, `per_head` and `shift_mask`.

A mask defines which (query, key) pairs may attend. `evaluate` computes any block of it, so that
backends evaluate only the blocks they visit, and `block_summary` reports in advance which blocks
are empty, which are full, and which must be evaluated. Concrete masks are in `basic.py`,
`intervals.py`, `sparse.py` and `grids.py`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.pairwise import PairIndices, PairwiseFn, TracedFn, block_indices, pair_indices, pytree
from attnlab.errors import InputError

Index = int | Int[Array, ""]
BlockOffset = tuple[Index, Index, Index, Index]  # batch row, head, query, key


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

    The last blocks may be smaller. `offset` is the global index of the first batch row, head, query
    and key.
    """

    num_queries: int
    num_keys: int
    block_q: int
    block_kv: int
    batch: int = 1
    heads: int = 1
    offset: BlockOffset = (0, 0, 0, 0)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Number of blocks along queries, and along keys."""
        return -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_kv)


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

    def count_per_block(self, at: PairIndices, block_kv: int) -> Int[Array, "B H T N"]:
        """Return how many keys of each block a query may attend to.

        This default evaluates every pair.
        """
        allowed = self.evaluate(at)
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:3], at.kv.shape[-1]))
        padding = -at.kv.shape[-1] % block_kv
        allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, padding)])
        return allowed.reshape(*allowed.shape[:3], -1, block_kv).sum(-1)

    def block_summary(self, grid: BlockGrid) -> BlockSummary:
        """Return bounds on each block of the grid; see `BlockSummary`.

        This default is exact, and computed from `count_per_block`.
        """
        starts = np.arange(grid.num_blocks[1]) * grid.block_kv
        sizes = np.minimum(grid.block_kv, grid.num_keys - starts)[None, None, None]

        def summarize(counts, is_query):
            return (is_query & (counts > 0)).any(2), (~is_query | (counts == sizes)).all(2)

        any_allowed, all_allowed = self._map_query_blocks(grid, summarize)
        return BlockSummary(jnp.moveaxis(any_allowed, 0, 2), jnp.moveaxis(all_allowed, 0, 2))

    def _map_query_blocks(self, grid: BlockGrid, summarize: Callable[[Array, Array], Any]) -> Any:
        """Return `summarize(counts, is_query)` of each block of queries, stacked on a new axis 0.

        `counts` is `count_per_block` of the block; `is_query` is False for padding queries.
        """
        count, _ = grid.num_blocks
        padded = self.pad_to(queries=count * grid.block_q)

        def query_block(i):
            b, h, q, k = grid.offset
            shape = grid.batch, grid.heads, grid.block_q, grid.num_keys
            at = block_indices((b, h, q + i * grid.block_q, k), shape)
            part = padded.slice_block(queries=(i * grid.block_q, grid.block_q))
            counts = part.count_per_block(at, grid.block_kv)
            return summarize(counts, at.q - q < grid.num_queries)

        return jax.lax.map(query_block, jnp.arange(count))

    def materialize(
        self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1
    ) -> Bool[Array, "B H T S"]:
        """Return the mask as one boolean array.

        The dimensions of batch and heads may be 1 if the mask does not depend on them.
        """
        allowed = self.evaluate(pair_indices(batch, heads, num_queries, num_keys))
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], num_queries, num_keys))

    def density(self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1) -> float:
        """Return the exact fraction of allowed pairs, counted one block of queries at a time."""
        rows = max(1, min(num_queries, 2**22 // (num_keys * batch * heads)))
        grid = BlockGrid(num_queries, num_keys, rows, num_keys, batch, heads)

        def count(counts, is_query):
            return jnp.where(is_query, counts, 0).sum(2)

        counts = np.asarray(self._map_query_blocks(grid, count))
        num_pairs = num_queries * num_keys * counts.shape[1] * counts.shape[2]
        return counts.sum(dtype=np.int64).item() / num_pairs

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

    def count_per_block(self, at, block_kv):
        """See `Mask.count_per_block`: differences of `count_before` between the block edges."""
        ends = jnp.concatenate([at.kv[..., ::block_kv], at.kv[..., -1:] + 1], axis=-1)
        return jnp.diff(self.count_before(at._replace(kv=ends)), axis=-1)


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
        a, b = self.left.block_summary(grid), self.right.block_summary(grid)
        return BlockSummary(a.any_allowed & b.any_allowed, a.all_allowed & b.all_allowed)


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
        a, b = self.left.block_summary(grid), self.right.block_summary(grid)
        return BlockSummary(a.any_allowed | b.any_allowed, a.all_allowed | b.all_allowed)


@pytree
class NotMask(Mask):
    """The pairs that a mask does not allow."""

    mask: Mask

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return ~self.mask.evaluate(at)

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        summary = self.mask.block_summary(grid)
        return BlockSummary(~summary.all_allowed, ~summary.any_allowed)


@pytree
class PerHeadMask(Mask):
    """A separate mask for each query head.

    Attributes:
      masks: the distinct masks.
      mask_of_head: index into `masks` for each head.
    """

    masks: list[Mask]
    mask_of_head: tuple[int, ...]

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self._select(at.h, [mask.evaluate(at) for mask in self.masks])

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        heads = jnp.reshape(grid.offset[1] + jnp.arange(grid.heads), (1, -1, 1, 1))
        summaries = [mask.block_summary(grid) for mask in self.masks]
        return BlockSummary(*(self._select(heads, parts) for parts in zip(*summaries, strict=True)))

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

    def count_per_block(self, at, block_kv):
        """See `Mask.count_per_block`."""
        if isinstance(self.mask, CountingMask):
            return CountingMask.count_per_block(self, at, block_kv)  # type: ignore[arg-type]
        return super().count_per_block(at, block_kv)

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

    function: TracedFn
    captured: Any

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self.function(self.captured, at.b, at.h, at.q, at.kv) != 0


def mask_fn(function: Callable[[Array, Array, Array, Array], Array]) -> Mask:
    """Return the mask that allows query q to attend to key k where `function(b, h, q, k)` is true.

    b is the batch row and h the query head. The function is traced once with scalars. Arrays that
    it captures are replicated on every device.

    Raises:
      InputError: the function does not return one scalar.
    """
    return MaskFn(*TracedFn.trace(function, [jnp.int32(0)] * 4, "a mask function"))


def per_head(masks: Sequence[Any]) -> Mask:
    """Return the mask that applies a separate mask to each query head.

    Masks of the same structure that hold the same arrays are evaluated once.

    Raises:
      InputError: `masks` is empty.
    """
    if not masks:
        raise InputError("per_head: masks must hold one mask per query head; got an empty sequence")
    masks = [as_mask(mask) for mask in masks]
    keys = [(jax.tree.structure(mask), *map(id, jax.tree.leaves(mask))) for mask in masks]
    distinct = dict(zip(keys, masks, strict=True))
    return PerHeadMask(list(distinct.values()), tuple(list(distinct).index(key) for key in keys))


def shift_mask(mask: Any, offset: Index | Int[Array, " B"]) -> Mask:
    """Return `mask` with query and key indices counted from key `offset` of each row.

    Use it for left padding. Keys before the offset are masked.

    Raises:
      InputError: the mask holds an array with one entry per query or key, which cannot be shifted.
    """

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
    """Return `value` as a mask: a mask, a boolean array of at most 4 dimensions, or a function."""
    if isinstance(value, Mask):
        return value
    if callable(value):
        return mask_fn(value)
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    return DenseMask(array.reshape(*(1,) * (4 - array.ndim), *array.shape).astype(bool))


def depends_on_batch_and_heads(mask: Mask) -> tuple[bool, bool]:
    """Return whether a mask depends on the batch row, and whether it depends on the head."""
    # Evaluate two rows and two heads, so that a dependence on their index shows in the shape.
    two, one = (0, 2), (0, 1)
    ranges = {"batch": two, "heads": two, "queries": one, "keys": one}
    evaluated = jax.eval_shape(lambda: mask.slice_block(**ranges).evaluate(pair_indices(2, 2, 1, 1)))
    return evaluated.shape[0] > 1, evaluated.shape[1] > 1
