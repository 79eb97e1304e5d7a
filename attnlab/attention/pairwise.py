"""Base classes of masks and scores: functions of a (query, key) pair that may hold arrays.

A `PairwiseFn` names the dimensions of its arrays, so that a backend can slice them to one block of
the scores, pad them, and shard them like the scores.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Dims = tuple[str | None, ...]
T = TypeVar("T")


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


def eval_at_trace_time(function: Callable[[], T]) -> T:
    """Call `function` eagerly, even under a trace, and return its result as NumPy arrays.

    `function` must not close over tracers. It runs in a separate thread, which has neither a trace
    nor a mesh. `jax.ensure_compile_time_eval` would run on the devices of the mesh instead, which
    may belong to other hosts or, for ahead-of-time compilation, not exist.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, function())).result()


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


def slice_at(x: Array, starts: Sequence, sizes: Sequence[int]) -> Array:
    """Return the slice of an array at these starts, integers of any types."""
    return jax.lax.dynamic_slice(x, as_starts(starts), sizes)


def as_starts(starts: Sequence) -> list[Array]:
    """Return the starts of a slice as int32, from integers of any types."""
    # With 64-bit types enabled, loop counters are int64 and the indices of a block mask int32.
    return [jnp.asarray(start, jnp.int32) for start in starts]
