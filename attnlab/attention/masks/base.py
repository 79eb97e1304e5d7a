"""What a mask is: a value that says which pairs may attend, combined with `&`, `|` and `~`.

A mask answers for any rectangle of pairs, so that a backend asks only for the tiles it visits, and says
beforehand which tiles are empty, which are full, and which it has to be asked about. The kinds there are
stand in `basic.py`, `intervals.py`, `sparse.py` and `grids.py`.
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
    """What is known of each block of a mask, (B or 1, H or 1, query blocks, key blocks).

    Attributes:
      any_allowed: some pair of it may be allowed; where False, none is.
      all_allowed: every pair of it is allowed; where False, some may not be.
    """

    any_allowed: Bool[Array, "B H Q S"]
    all_allowed: Bool[Array, "B H Q S"]


class BlockGrid(NamedTuple):
    """Blocks of `block_q` by `block_kv` pairs, over these numbers of queries, keys, rows and heads.

    The last blocks may be smaller. Indices count from `offset`, (batch row, head, query, key).
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
        """How many blocks there are along queries, and along keys."""
        return -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_kv)


class Mask(PairwiseFn):
    """Base class: implement `evaluate`, and `block_summary` where it is known without every pair."""

    def evaluate(self, at: PairIndices) -> Bool[Array, "B H T S"]:
        """Which of these pairs may attend, of a shape that broadcasts to (B, H, T, S).

        The mask's own arrays are cut to the same pairs already, by their `dims`.
        """
        raise NotImplementedError

    def count_per_block(self, at: PairIndices, block_kv: int) -> Int[Array, "B H T N"]:
        """How many of each `block_kv` keys a query may attend to; here by looking at every pair."""
        allowed = self.evaluate(at)
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:3], at.kv.shape[-1]))
        padding = -at.kv.shape[-1] % block_kv
        allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, padding)])
        return allowed.reshape(*allowed.shape[:3], -1, block_kv).sum(-1)

    def block_summary(self, grid: BlockGrid) -> BlockSummary:
        """What is known of each block; here exactly, from `count_per_block`."""
        starts = np.arange(grid.num_blocks[1]) * grid.block_kv
        sizes = np.minimum(grid.block_kv, grid.num_keys - starts)[None, None, None]

        def summarize(counts, is_query):
            return (is_query & (counts > 0)).any(2), (~is_query | (counts == sizes)).all(2)

        any_allowed, all_allowed = self._map_query_blocks(grid, summarize)
        return BlockSummary(jnp.moveaxis(any_allowed, 0, 2), jnp.moveaxis(all_allowed, 0, 2))

    def _map_query_blocks(self, grid: BlockGrid, summarize: Callable[[Array, Array], Any]) -> Any:
        """Of each strip of queries, along a new first axis: `summarize(counts, is_query)`."""
        count, _ = grid.num_blocks
        padded = self.pad_to(queries=count * grid.block_q)

        def strip(i):
            b, h, q, k = grid.offset
            shape = grid.batch, grid.heads, grid.block_q, grid.num_keys
            at = block_indices((b, h, q + i * grid.block_q, k), shape)
            part = padded.slice_block(queries=(i * grid.block_q, grid.block_q))
            counts = part.count_per_block(at, grid.block_kv)
            return summarize(counts, at.q - q < grid.num_queries)

        return jax.lax.map(strip, jnp.arange(count))

    def materialize(
        self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1
    ) -> Bool[Array, "B H T S"]:
        """The whole mask as one boolean array; dimensions that it does not depend on may be 1."""
        allowed = self.evaluate(pair_indices(batch, heads, num_queries, num_keys))
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], num_queries, num_keys))

    def density(self, num_queries: int, num_keys: int, batch: int = 1, heads: int = 1) -> float:
        """The exact share of allowed pairs, counted a strip of queries at a time."""
        rows = max(1, min(num_queries, 2**22 // (num_keys * batch * heads)))
        grid = BlockGrid(num_queries, num_keys, rows, num_keys, batch, heads)

        def count(counts, is_query):
            return jnp.where(is_query, counts, 0).sum(2)

        counts = np.asarray(self._map_query_blocks(grid, count))
        num_pairs = num_queries * num_keys * counts.shape[1] * counts.shape[2]
        return counts.sum(dtype=np.int64).item() / num_pairs

    def draw(self, num_queries: int, num_keys: int, row: int = 0, head: int = 0) -> str:
        """The mask as text, a line a query: `x` where it may attend, `.` where not."""
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
    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to the mask


class CountingMask(Mask):
    """Base of masks that know how many keys a query may attend to without looking at each of them."""

    def count_before(self, at: PairIndices) -> Int[Array, "B H T S"]:
        """How many keys before each of `at.kv` a query may attend to, up to a number of the query's own."""
        raise NotImplementedError

    def count_per_block(self, at, block_kv):
        """See `Mask.count_per_block`: the difference of `count_before` between the ends of each run."""
        ends = jnp.concatenate([at.kv[..., ::block_kv], at.kv[..., -1:] + 1], axis=-1)
        return jnp.diff(self.count_before(at._replace(kv=ends)), axis=-1)


@pytree
class AndMask(Mask):
    """Pairs that both masks allow."""

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
    """Pairs that either mask allows."""

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
    """Pairs that the mask forbids."""

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
    """Another mask in each head.

    Attributes:
      masks: the different ones.
      mask_of_head: the index of each head's mask.
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
        """Of each head what its own mask says."""
        index = jnp.asarray(self.mask_of_head)[heads]
        return functools.reduce(operator.or_, ((index == i) & part for i, part in enumerate(parts)))


@pytree
class ShiftedMask(Mask):
    """Another mask that counts queries and keys from a key of each row; those before it are seen by none.

    Attributes:
      mask: the other one.
      offset: the key it counts from, a number or (B,).
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
        """See `CountingMask.count_before`: keys before the first are none."""
        at = self._shift(at)
        return self.mask.count_before(at._replace(kv=jnp.maximum(at.kv, 0)))

    def _shift(self, at: PairIndices) -> PairIndices:
        offset = jnp.reshape(self.offset, (-1, 1, 1, 1))
        return at._replace(q=at.q - offset, kv=at.kv - offset)


@pytree
class DenseMask(Mask):
    """Any boolean array, whose dimensions of batch and heads may be 1."""

    allowed: Bool[Array, "B H T S"]

    dims = {"allowed": ("batch", "heads", "queries", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return jnp.asarray(self.allowed)


@pytree
class MaskFn(Mask):
    """A function of the indices of one pair, written by the user."""

    function: TracedFn
    captured: Any

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self.function(self.captured, at.b, at.h, at.q, at.kv) != 0


def mask_fn(function: Callable[[Array, Array, Array, Array], Array]) -> Mask:
    """Return the mask of `function(b, h, q, k)`, true where query q may attend to key k.

    b is the row of the batch and h the query head. It is traced once with scalars. Arrays that it
    captures are whole on every device.

    Raises:
      InputError: it does not return one scalar.
    """
    return MaskFn(*TracedFn.trace(function, [jnp.int32(0)] * 4, "a mask function"))


def per_head(masks: Sequence[Any]) -> Mask:
    """Return the mask that gives each query head a mask of its own.

    Masks of one type that hold the same arrays are evaluated once.

    Raises:
      InputError: no masks.
    """
    if not masks:
        raise InputError("per_head needs a mask for each query head, and there is none")
    masks = [as_mask(mask) for mask in masks]
    # Masks of one type that hold the same arrays are one.
    keys = [(jax.tree.structure(mask), *map(id, jax.tree.leaves(mask))) for mask in masks]
    distinct = dict(zip(keys, masks, strict=True))
    return PerHeadMask(list(distinct.values()), tuple(list(distinct).index(key) for key in keys))


def shift_mask(mask: Any, offset: Index | Int[Array, " B"]) -> Mask:
    """Return `mask` with queries and keys counted from key `offset` of each row, as for left padding.

    Keys before the offset are forbidden.

    Raises:
      InputError: the mask has an array of queries or keys, which cannot be shifted.
    """

    def check(x, dims):
        for name, n in zip(dims, jnp.shape(x), strict=True):
            if name in ("queries", "keys") and n > 1:
                raise InputError(f"shift_mask: the mask has an array of {n} {name}, where it must count them")
        return x

    offset = offset if isinstance(offset, int) else jnp.reshape(offset, (-1,))

    def shift(mask):  # each part by itself, for some know their blocks without evaluating every pair
        match mask:
            case AndMask() | OrMask():
                return type(mask)(shift(mask.left), shift(mask.right))
        return ShiftedMask(mask, offset)

    return shift(as_mask(mask).map_arrays(check))


def as_mask(value: Any) -> Mask:
    """A mask, a boolean array of up to four dimensions as one, or a function as one."""
    if isinstance(value, Mask):
        return value
    if callable(value):
        return mask_fn(value)
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    return DenseMask(array.reshape(*(1,) * (4 - array.ndim), *array.shape).astype(bool))


def depends_on_batch_and_heads(mask: Mask) -> tuple[bool, bool]:
    """Whether a mask differs between rows of the batch, and between heads."""
    # Two of each, so that a function of their index shows it.
    two, one = (0, 2), (0, 1)
    ranges = {"batch": two, "heads": two, "queries": one, "keys": one}
    evaluated = jax.eval_shape(lambda: mask.slice_block(**ranges).evaluate(pair_indices(2, 2, 1, 1)))
    return evaluated.shape[0] > 1, evaluated.shape[1] > 1
