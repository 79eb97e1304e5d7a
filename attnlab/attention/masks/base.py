"""What a mask is: a value that says which pairs may attend, combined with `&`, `|` and `~`.

A mask answers for any rectangle of pairs, so that a backend asks only for the tiles it visits, and says
beforehand which tiles are empty, which are full, and which it has to be asked about. The kinds there are
stand in `patterns.py`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.pairwise import Function, Pairs, Value, pairs, pytree, rectangle
from attnlab.errors import InputError

Index = int | Int[Array, ""]
First = tuple[Index, Index, Index, Index]  # batch row, head, query, key


class Tiles(NamedTuple):
    """What is known of each tile of a mask, (B or 1, H or 1, query tiles, key tiles).

    Attributes:
      some: some pair of it may be allowed; where False, none is.
      every: every pair of it is allowed; where False, some may not be.
    """

    some: Bool[Array, "B H Q S"]
    every: Bool[Array, "B H Q S"]


class Grid(NamedTuple):
    """Tiles of `rows` queries and `columns` keys, over so many queries and keys of so many rows and heads.

    The last tiles may be smaller. Indices count from `first`, (batch row, head, query, key).
    """

    queries: int
    keys: int
    rows: int
    columns: int
    batch: int = 1
    heads: int = 1
    first: First = (0, 0, 0, 0)

    @property
    def counts(self) -> tuple[int, int]:
        """How many tiles there are along queries, and along keys."""
        return -(-self.queries // self.rows), -(-self.keys // self.columns)


class Mask(Value):
    """Base class: implement `block`, and `tiles` where the answer is known without looking at every pair."""

    def block(self, at: Pairs) -> Bool[Array, "B H T S"]:
        """Which of these pairs may attend, of a shape that broadcasts to (B, H, T, S).

        The mask's own arrays are cut to the same pairs already, by their `layout`.
        """
        raise NotImplementedError

    def tally(self, at: Pairs, columns: int) -> Int[Array, "B H T N"]:
        """How many of each `columns` keys a query may attend to; here by looking at every pair."""
        allowed = self.block(at)
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:3], at.keys.shape[-1]))
        more = -at.keys.shape[-1] % columns
        allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, more)])
        return allowed.reshape(*allowed.shape[:3], -1, columns).sum(-1)

    def tiles(self, grid: Grid) -> Tiles:
        """What is known of each tile; here exactly, from `tally`."""
        starts = np.arange(grid.counts[1]) * grid.columns
        sizes = np.minimum(grid.columns, grid.keys - starts)[None, None, None]

        def summary(seen, there):
            return (there & (seen > 0)).any(2), (~there | (seen == sizes)).all(2)

        some, every = self._strips(grid, summary)
        return Tiles(jnp.moveaxis(some, 0, 2), jnp.moveaxis(every, 0, 2))

    def _strips(self, grid: Grid, summary: Callable[[Array, Array], Any]) -> Any:
        """Of each strip of queries, along a new first axis: `summary(tally, which queries there are)`."""
        count, _ = grid.counts
        padded = self.pad(queries=count * grid.rows)

        def strip(i):
            b, h, q, k = grid.first
            at = rectangle((b, h, q + i * grid.rows, k), (grid.batch, grid.heads, grid.rows, grid.keys))
            seen = padded.cut(queries=(i * grid.rows, grid.rows)).tally(at, grid.columns)
            return summary(seen, (at.queries - q < grid.queries))

        return jax.lax.map(strip, jnp.arange(count))

    def materialize(
        self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1
    ) -> Bool[Array, "B H T S"]:
        """The whole mask as one boolean array; dimensions that it does not depend on may be 1."""
        allowed = self.block(pairs(batch, heads, num_queries, num_keys))
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], num_queries, num_keys))

    def density(self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1) -> float:
        """The exact share of allowed pairs, counted a strip of queries at a time."""
        rows = max(1, min(num_queries, 2**22 // (num_keys * batch * heads)))
        grid = Grid(num_queries, num_keys, rows, num_keys, batch, heads)
        seen = np.asarray(self._strips(grid, lambda seen, there: jnp.where(there, seen, 0).sum(2)))
        return seen.sum(dtype=np.int64).item() / (num_queries * num_keys * seen.shape[1] * seen.shape[2])

    def draw(self, num_queries: int, num_keys: int, row: int = 0, head: int = 0) -> str:
        """The mask as text, a line a query: `x` where it may attend, `.` where not."""
        whole = np.asarray(self.materialize(num_queries, num_keys, row + 1, head + 1))
        lines = whole[min(row, len(whole) - 1), min(head, whole.shape[1] - 1)]
        return "\n".join(" ".join("x" if allowed else "." for allowed in line) for line in lines)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, as_mask(other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, as_mask(other))

    def __invert__(self) -> "Mask":
        return Not(self)

    __rand__, __ror__ = __and__, __or__
    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to the mask


class Counted(Mask):
    """Base of masks that know how many keys a query may attend to without looking at each of them."""

    def count(self, at: Pairs) -> Int[Array, "B H T S"]:
        """How many keys before each of `at.keys` a query may attend to, up to a number of the query's own."""
        raise NotImplementedError

    def tally(self, at, columns):
        """See `Mask.tally`: the difference of `count` between the ends of each run."""
        ends = jnp.concatenate([at.keys[..., ::columns], at.keys[..., -1:] + 1], axis=-1)
        return jnp.diff(self.count(at._replace(keys=ends)), axis=-1)


@pytree
class And(Mask):
    """Pairs that both masks allow."""

    left: Mask
    right: Mask

    def block(self, at):
        """See `Mask.block`."""
        return self.left.block(at) & self.right.block(at)

    def tiles(self, grid):
        """See `Mask.tiles`."""
        a, b = self.left.tiles(grid), self.right.tiles(grid)
        return Tiles(a.some & b.some, a.every & b.every)


@pytree
class Or(Mask):
    """Pairs that either mask allows."""

    left: Mask
    right: Mask

    def block(self, at):
        """See `Mask.block`."""
        return self.left.block(at) | self.right.block(at)

    def tiles(self, grid):
        """See `Mask.tiles`."""
        a, b = self.left.tiles(grid), self.right.tiles(grid)
        return Tiles(a.some | b.some, a.every | b.every)


@pytree
class Not(Mask):
    """Pairs that the mask forbids."""

    mask: Mask

    def block(self, at):
        """See `Mask.block`."""
        return ~self.mask.block(at)

    def tiles(self, grid):
        """See `Mask.tiles`."""
        known = self.mask.tiles(grid)
        return Tiles(~known.every, ~known.some)


@pytree
class PerHead(Mask):
    """Another mask in each head.

    Attributes:
      masks: the different ones.
      kinds: which of them each head has.
    """

    masks: list[Mask]
    kinds: tuple[int, ...]

    def block(self, at):
        """See `Mask.block`."""
        return self._any(at.heads, [mask.block(at) for mask in self.masks])

    def tiles(self, grid):
        """See `Mask.tiles`."""
        heads = jnp.reshape(grid.first[1] + jnp.arange(grid.heads), (1, -1, 1, 1))
        known = [mask.tiles(grid) for mask in self.masks]
        return Tiles(*(self._any(heads, parts) for parts in zip(*known, strict=True)))

    def _any(self, heads, parts):
        """Of each head what its own mask says."""
        kinds = jnp.asarray(self.kinds)[heads]
        return functools.reduce(operator.or_, ((kinds == i) & part for i, part in enumerate(parts)))


@pytree
class Moved(Mask):
    """Another mask that counts queries and keys from a key of each row; those before it are seen by none.

    Attributes:
      mask: the other one.
      by: the key it counts from, a number or (B,).
    """

    mask: Mask
    by: Index

    layout = {"by": ("batch",)}

    def block(self, at):
        """See `Mask.block`."""
        at = self._moved(at)
        return self.mask.block(at) & (at.keys >= 0)

    def tally(self, at, columns):
        """See `Mask.tally`."""
        if isinstance(self.mask, Counted):
            return Counted.tally(self, at, columns)  # type: ignore[arg-type]
        return super().tally(at, columns)

    def count(self, at):
        """See `Counted.count`: keys before the first are none."""
        at = self._moved(at)
        return self.mask.count(at._replace(keys=jnp.maximum(at.keys, 0)))

    def _moved(self, at: Pairs) -> Pairs:
        by = jnp.reshape(self.by, (-1, 1, 1, 1))
        return at._replace(queries=at.queries - by, keys=at.keys - by)


@pytree
class Dense(Mask):
    """Any boolean array, whose dimensions of batch and heads may be 1."""

    allowed: Bool[Array, "B H T S"]

    layout = {"allowed": ("batch", "heads", "queries", "keys")}

    def block(self, at):
        """See `Mask.block`."""
        return jnp.asarray(self.allowed)


@pytree
class Call(Mask):
    """A function of the indices of one pair, written by the user."""

    function: Function
    captured: Any

    def block(self, at):
        """See `Mask.block`."""
        return self.function(self.captured, at.batch, at.heads, at.queries, at.keys) != 0


def mask_fn(function: Callable[[Array, Array, Array, Array], Array]) -> Mask:
    """The mask of `function(b, h, q, k)`: may query q attend to key k, in row b of the batch, in head h?

    It is traced once with scalars. Arrays that it captures are whole on every device.

    Raises:
      InputError: it does not return one scalar.
    """
    return Call(*Function.trace(function, [jnp.int32(0)] * 4, "a mask function"))


def per_head(masks: Sequence[Any]) -> Mask:
    """See `PerHead`; a mask for each query head, where one mask may stand for many heads.

    Raises:
      InputError: no masks.
    """
    if not masks:
        raise InputError("per_head needs a mask for each query head, and there is none")
    made = [as_mask(mask) for mask in masks]
    # Masks of one type that hold the same arrays are one.
    names = [(jax.tree.structure(mask), *map(id, jax.tree.leaves(mask))) for mask in made]
    different = dict(zip(names, made, strict=True))
    return PerHead(list(different.values()), tuple(list(different).index(name) for name in names))


def moved(mask: Any, by: Index | Int[Array, " B"]) -> Mask:
    """See `Moved`: where rows are padded on the left, the mask of each row without its padding.

    Raises:
      InputError: the mask has an array of queries or keys, which cannot be moved.
    """

    def check(x, layout):
        for name, n in zip(layout, jnp.shape(x), strict=True):
            if name in ("queries", "keys") and n > 1:
                raise InputError(f"moved: the mask has an array of {n} {name}, where it must count them")
        return x

    by = by if isinstance(by, int) else jnp.reshape(by, (-1,))

    def move(mask):  # each part by itself, for some know their tiles without looking at every pair
        match mask:
            case And() | Or():
                return type(mask)(move(mask.left), move(mask.right))
        return Moved(mask, by)

    return move(as_mask(mask).map(check))


def as_mask(value: Any) -> Mask:
    """A mask, a boolean array of up to four dimensions as one, or a function as one."""
    if isinstance(value, Mask):
        return value
    if callable(value):
        return mask_fn(value)
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    return Dense(array.reshape(*(1,) * (4 - array.ndim), *array.shape).astype(bool))
