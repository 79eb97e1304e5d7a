"""Functions of a (query, key) pair, the base of masks and scores, and grids of blocks of pairs.

A `PairwiseFn` names the dimensions of its arrays, so that a backend can slice them to one block of
the scores, pad them, and shard them like the scores. A `BlockGrid` divides the scores into blocks,
and a `BlockSummary` bounds the pairs that a mask allows in each of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Dims = tuple[str | None, ...]
T = TypeVar("T")
Index = int | Int[Array, ""]
BlockOffset = tuple[Index, Index, Index, Index]  # batch row, head, query, key
# The first allowed key and the end (exclusive) of the allowed keys of each block of queries.
KVBounds = tuple[np.ndarray, np.ndarray]


class PairIndices(NamedTuple):
    """Indices of the batch rows, query heads, queries and keys of a block of scores, (B, H, T, S).

    The indices are global: they count over the whole batch, all heads and the whole sequence, also
    on a device that holds only a shard. Each is a four-dimensional array that broadcasts against
    the scores, so masks and scores can be written as formulas: `at.kv <= at.q`.
    """

    b: Int[Array, "B 1 1 1"]
    h: Int[Array, "1 H 1 1"]
    q: Int[Array, "1 1 T 1"]
    kv: Int[Array, "1 1 1 S"]


def pair_indices(*indices: int | Int[Array, " N"]) -> PairIndices:
    """Return the indices of these batch rows, heads, queries, keys; an int n means 0 to n - 1."""
    arrays = (jnp.arange(x) if isinstance(x, int) else x for x in indices)
    return PairIndices(
        *(jnp.expand_dims(x, [i for i in range(4) if i != axis]) for axis, x in enumerate(arrays))
    )


def block_indices(offset: Sequence[int | Array], shape: Sequence[int]) -> PairIndices:
    """Return the indices of a block with this shape and this (batch, head, query, key) offset."""
    return pair_indices(*(start + jnp.arange(n) for start, n in zip(offset, shape, strict=True)))


class PairwiseFn:
    """Base class of masks and scores. Subclasses are frozen dataclasses, registered by `pytree`.

    Attributes:
      dims: names of the dimensions of each array field: "batch", "heads", "queries", "keys" or
        None. A named dimension has length 1 or the length of that dimension of the scores. Backends
        slice named dimensions to the block they evaluate and shard them like the scores. Unnamed
        dimensions are never sliced or sharded.
    """

    dims: ClassVar[dict[str, Dims]] = {}

    def __bool__(self) -> bool:
        """Raise TypeError: `a and b` would silently drop a mask, and `not a` would be False."""
        raise TypeError(
            f"a {type(self).__name__} has no truth value: combine masks with &, | and ~ instead of and, or "
            "and not; pass several scores as a list; test for a missing one with `is None`"
        )

    def walk(self) -> "Iterator[PairwiseFn]":
        """Yield this mask or score and every one it is composed of."""
        yield self
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # by `pytree`
            value = getattr(self, field.name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, PairwiseFn):
                    yield from part.walk()

    def map_arrays(self, change: Callable[[Array, Dims], Any]) -> Self:
        """Return a copy in which every array or number x is `change(x, dims of x)`."""

        def visit(value, dims=None):
            if isinstance(value, PairwiseFn):
                return value.map_arrays(change)
            if value is None:
                return None
            if isinstance(value, list):
                return [visit(v) for v in value]
            # A scalar is valid wherever an array has dimensions: one value for all batch rows.
            return change(value, (None,) * jnp.ndim(value) if dims is None or not jnp.ndim(value) else dims)

        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # a dataclass by `pytree`
        values = {
            f.name: getattr(self, f.name)
            if f.metadata.get("static")
            else visit(getattr(self, f.name), self.dims.get(f.name))
            for f in fields
        }
        return type(self)(**values)

    def slice_block(self, **ranges: tuple[int | Array, int]) -> Self:
        """Return a copy with named dimensions sliced to `(start, length)`: `queries=(64, 32)`."""

        def change(x, dims):
            for axis, name in enumerate(dims):
                if name in ranges and x.shape[axis] > 1:
                    x = jax.lax.dynamic_slice_in_dim(x, *ranges[name], axis)
            return x

        return self.map_arrays(change)

    def pad_to(self, **lengths: int) -> Self:
        """Return a copy with named dimensions padded to these lengths with their last value."""

        def change(x, dims):
            padding = [
                lengths.get(name, n) - n if n > 1 else 0 for name, n in zip(dims, jnp.shape(x), strict=True)
            ]
            return jnp.pad(x, [(0, n) for n in padding], mode="edge") if any(padding) else x

        return self.map_arrays(change)


def static(**options: Any) -> Any:
    """Return a dataclass field that is part of the tree structure, not a leaf; see `pytree`."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and register it as a pytree.

    A field declared with `static()` is part of the tree structure and must be hashable. All other
    fields are children, whatever their value: a Python number is a leaf. So a transformation that
    maps the leaves to tracers or to other objects keeps the structure.
    """
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False)(cls))


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
