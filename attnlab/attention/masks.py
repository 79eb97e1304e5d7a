"""Which pairs may attend: masks as values, combined with `&`, `|` and `~`.

A mask answers for any rectangle of query and key indices, so that a backend asks only for the
blocks it visits. It also says which keys a run of queries can reach, so that whole blocks are skipped.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Index = int | Int[Array, ""]
T = TypeVar("T")


class Mask:
    """Base class: implement `block`, and `reach` where whole runs of keys are excluded."""

    def block(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Bool[Array, "B 1 T S"]:
        """Which of these pairs may attend; dimensions (batch or 1, heads or 1, T, S)."""
        raise NotImplementedError

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        """A range [low, high) of keys outside of which queries first..last attend to nothing."""
        del first, last
        return 0, length

    def materialize(self, num_queries: int, num_keys: int) -> Bool[Array, "B 1 T S"]:
        """The whole mask as one boolean array."""
        return self.block(jnp.arange(num_queries), jnp.arange(num_keys))

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclass_transform(frozen_default=True)
def _pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree; fields marked static are part of its type."""
    cls = dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # it has just become one
    static = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if f.name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@_pytree
class And(Mask):
    """Pairs that both masks allow."""

    left: Mask
    right: Mask

    def block(self, queries, keys):
        """See `Mask.block`."""
        return self.left.block(queries, keys) & self.right.block(queries, keys)

    def reach(self, first, last, length):
        """The overlap of both ranges."""
        (a, b), (c, d) = self.left.reach(first, last, length), self.right.reach(first, last, length)
        low = max(a, c)
        return low, max(low, min(b, d))


@_pytree
class Or(Mask):
    """Pairs that either mask allows."""

    left: Mask
    right: Mask

    def block(self, queries, keys):
        """See `Mask.block`."""
        return self.left.block(queries, keys) | self.right.block(queries, keys)

    def reach(self, first, last, length):
        """The smallest range around both."""
        (a, b), (c, d) = self.left.reach(first, last, length), self.right.reach(first, last, length)
        return min(a, c), max(b, d)


@_pytree
class Not(Mask):
    """Pairs that the mask forbids."""

    mask: Mask

    def block(self, queries, keys):
        """See `Mask.block`."""
        return ~self.mask.block(queries, keys)


@_pytree
class Causal(Mask):
    """Key index at most the query's: query i sits at key index i + offset.

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   x x x .
    """

    offset: int = _static(default=0)

    def block(self, queries, keys):
        """See `Mask.block`."""
        return (keys[None, :] <= queries[:, None] + self.offset)[None, None]

    def reach(self, first, last, length):
        """Nothing after the last query."""
        return 0, max(0, min(length, last + self.offset + 1))


@_pytree
class Window(Mask):
    """Keys from `left` before the query to `right` after it, itself included; None is no limit.

    Window(left=1, right=0):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   . x x .
    """

    left: int | None = _static(default=None)
    right: int | None = _static(default=None)
    offset: int = _static(default=0)

    def block(self, queries, keys):
        """See `Mask.block`."""
        distance = keys[None, :] - (queries[:, None] + self.offset)
        allowed = jnp.ones(distance.shape, bool)
        if self.left is not None:
            allowed &= distance >= -self.left
        if self.right is not None:
            allowed &= distance <= self.right
        return allowed[None, None]

    def reach(self, first, last, length):
        """From `left` before the first query to `right` after the last."""
        low = 0 if self.left is None else first + self.offset - self.left
        high = length if self.right is None else last + self.offset + self.right + 1
        low = min(max(low, 0), length)
        return low, min(max(high, low), length)


@_pytree
class Segments(Mask):
    """Pairs inside one packed document; segment 0 is padding and attends to nothing.

    Attributes:
      queries: segment of each query, (B, T).
      keys: segment of each key, (B, S).
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]

    def block(self, queries, keys):
        """See `Mask.block`."""
        q = jnp.take(self.queries, queries, axis=1, mode="clip")[:, :, None]
        k = jnp.take(self.keys, keys, axis=1, mode="clip")[:, None, :]
        return ((q == k) & (k > 0))[:, None]


@_pytree
class Slots(Mask):
    """Keys of a cache filled up to a traced index: query i sits at slot `first` + i.

    Attributes:
      first: slot of the first query.
      left: how far back a query sees; None is no limit.
    """

    first: Index
    left: int | None = _static(default=None)

    def block(self, queries, keys):
        """See `Mask.block`."""
        distance = keys[None, :] - (queries[:, None] + self.first)
        allowed = distance <= 0
        if self.left is not None:
            allowed &= distance >= -self.left
        return allowed[None, None]


def causal(offset: int = 0) -> Mask:
    """See `Causal`."""
    return Causal(offset)


def window(left: int | None = None, right: int | None = None, offset: int = 0) -> Mask:
    """See `Window`."""
    return Window(left, right, offset)


def segments(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Mask:
    """See `Segments`; keys default to the queries' own."""
    return Segments(queries, queries if keys is None else keys)
