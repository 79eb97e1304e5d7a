"""Causal masks, windows and segments, and the normal form of any mask.

The normal form is a conjunction of the parts that kernels support, and the rest. Every backend
reads the masks that it supports from it, and the padding. The functions that tell which parts of a
mask are static, that is, not traced, are here as well.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnlab.attention.arrays import check_array, check_index, check_window
from attnlab.attention.masks.base import AndMask, BlockGrid, BlockSummary, Index, Mask
from attnlab.attention.masks.intervals import IntervalMask, KeyLengthMask, split_blocks, window_bounds
from attnlab.attention.pairwise import BlockOffset, pair_indices, pytree, static


@pytree
class CausalMask(IntervalMask):
    """Causal mask: a query attends to keys at or before its position, key index i + offset.

    An offset of S - T aligns the last of T queries with the last of S keys. causal():

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   x x x .
    """

    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [(0, at.q + self.offset + 1)]

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return at.kv - at.q <= self.offset

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = _distance_bounds(grid)
        return BlockSummary(low <= self.offset, high <= self.offset)


@pytree
class WindowMask(IntervalMask):
    """Sliding window from `left` keys before the query to `right` keys after it, inclusive.

    None means no limit in that direction.

    window(left=1, right=0):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   . x x .
    """

    left: int | None = static(default=None)
    right: int | None = static(default=None)
    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [window_bounds(at.q + self.offset, self.left, self.right)]

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = (x - self.offset for x in _distance_bounds(grid))
        before, after = window_bounds(0, self.left, self.right)
        return BlockSummary((low < after) & (high >= before), (high < after) & (low >= before))


@pytree
class SegmentMask(Mask):
    """Pairs within one packed document. Segment 0 is padding, which is masked everywhere.

    segments(jnp.array([[1, 1, 2, 0]])):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   . . x .
    query 3   . . . .

    Attributes:
      queries: segment id of each query, (B, T).
      keys: segment id of each key, (B, S).
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]

    dims = {"queries": ("batch", "queries"), "keys": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        q, k = self.queries[:, None, :, None], self.keys[:, None, None, :]
        return (q == k) & (k > 0)

    def block_summary(self, grid):
        """See `Mask.block_summary`: from bounds on the segment ids of each block of tokens."""
        q = _segment_bounds(self.queries, grid.block_q)
        k = _segment_bounds(self.keys, grid.block_kv)
        q, k = [x[:, None, :, None] for x in q], [grid.take_kv_blocks(x[:, None]) for x in k]
        (q_least, q_first, q_last), (k_least, k_first, k_last) = q, k
        any_allowed = (q_first <= k_last) & (k_first <= q_last)
        all_allowed = (q_least == k_last) & (k_least == k_last) & (q_last == k_last) & (k_last > 0)
        return BlockSummary(any_allowed, all_allowed)


def _distance_bounds(grid: BlockGrid):
    """Return the least and greatest key index minus query index of each block, (1, 1, Q, S)."""
    q, k = np.arange(0, grid.num_queries, grid.block_q)[:, None], grid.kv_blocks * grid.block_kv
    q_last = np.minimum(q + grid.block_q, grid.num_queries) - 1
    k_last = np.minimum(k + grid.block_kv, grid.num_keys) - 1
    shift = grid.offset[3] - grid.offset[2]
    low, high = k - q_last, k_last - q
    return low[None, None] + shift, high[None, None] + shift


def _segment_bounds(segments: Array, size: int):
    """Return bounds on the segment ids of each block of `size` tokens, (B, blocks).

    The three results are the least id, the least id that is not padding, and the greatest id.
    """
    segments = split_blocks(segments, size)
    tokens = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
    return segments.min(-1), tokens.min(-1), segments.max(-1)


def causal(offset: Index = 0) -> Mask:
    """Return the mask that allows keys at or before the query's position.

    Raises:
      InputError: `offset` is not an integer.
    """
    check_index("causal", offset=offset)
    return CausalMask(offset)


def window(left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """Return the mask of a window from `left` keys before to `right` keys after the query.

    Raises:
      InputError: an argument is not an integer, or `left` or `right` is negative.
    """
    check_window("window", left, right, offset)
    return WindowMask(left, right, offset)


def segments(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Mask:
    """Return the mask of pairs within one packed document; `keys` defaults to `queries`.

    Raises:
      InputError: the segment ids are not integer arrays (B, T) and (B, S).
    """
    keys = queries if keys is None else keys
    check_array("segments: queries", queries, "integer", 2)
    check_array("segments: keys", keys, "integer", 2)
    return SegmentMask(queries, keys)


@dataclass(frozen=True)
class NormalForm:
    """A mask as a conjunction: a pair may attend if every part allows it.

    Attributes:
      left: number of keys before the query that it attends to, from causal masks and windows with
        their offsets: an int if static, else a traced scalar. It may be negative. None means all.
      right: number of keys after the query that it attends to, likewise.
      segments: packed documents; None if there are none.
      lengths: padding at the end of keys and queries; None if there is none.
      intervals: other masks whose allowed keys are intervals, see `IntervalMask.kv_intervals`.
      rest: all other masks; None if there are none.
    """

    left: Index | None = None
    right: Index | None = None
    segments: SegmentMask | None = None
    lengths: KeyLengthMask | None = None
    intervals: tuple[IntervalMask, ...] = ()
    rest: Mask | None = None

    @property
    def static_bounds(self) -> tuple[int | None, int | None] | None:
        """`left` and `right`; None if one is traced."""
        left, right = self.left, self.right
        if isinstance(left, int | None) and isinstance(right, int | None):
            return left, right
        return None

    @property
    def is_relative(self) -> bool:
        """Whether `left` and `right` are the whole mask."""
        return self.segments is self.lengths is self.rest is None and not self.intervals

    def as_mask(self) -> Mask | None:
        """Return the conjunction of all parts; None if there are none."""
        parts = (*self._bounds(), self.segments, self.lengths, *self.intervals, self.rest)
        return conjunction(*parts)

    def _bounds(self) -> list[Mask]:
        """Return `left` and `right` as masks."""
        if isinstance(self.left, int) and isinstance(self.right, int):
            return [WindowMask(self.left, self.right)]
        masks: list[Mask] = [] if self.right is None else [CausalMask(self.right)]
        return masks if self.left is None else [WindowMask(0, None, -self.left), *masks]


def normal_form(mask: Mask | None) -> NormalForm:
    """Return the normal form of a mask; None is the mask that allows every pair."""
    lefts, rights, segments, lengths, intervals, rest = [], [], None, [], [], []
    for part in conjuncts(mask):
        match part:
            case CausalMask(offset=offset):
                rights.append(_static_number(offset))
            case WindowMask(left=left, right=right, offset=offset):
                offset = _static_number(offset)
                lefts += [] if left is None else [left - offset]
                rights += [] if right is None else [right + offset]
            case SegmentMask() if segments is None:
                segments = part
            case KeyLengthMask():
                lengths.append(part)
            case IntervalMask():
                intervals.append(part)
            case _:
                rest.append(part)
    return NormalForm(
        left=_minimum(lefts),
        right=_minimum(rights),
        segments=segments,
        lengths=_shortest(lengths),
        intervals=tuple(intervals),
        rest=conjunction(*rest),
    )


def conjuncts(mask: Mask | None) -> Iterator[Mask]:
    """Yield the masks whose conjunction is `mask`."""
    if isinstance(mask, AndMask):
        yield from conjuncts(mask.left)
        yield from conjuncts(mask.right)
    elif mask is not None:
        yield mask


@overload
def conjunction(mask: Mask, /, *masks: Mask | None) -> Mask: ...


@overload
def conjunction(*masks: Mask | None) -> Mask | None: ...


def conjunction(*masks: Mask | None) -> Mask | None:
    """Return the conjunction of masks. None is the mask that allows every pair."""
    parts = [mask for mask in masks if mask is not None]
    return reduce(operator.and_, parts) if parts else None


def _shortest(lengths: list[KeyLengthMask]) -> KeyLengthMask | None:
    if len(lengths) < 2:
        return lengths[0] if lengths else None
    keys = _minimum(mask.keys for mask in lengths)
    if all(mask.queries is mask.keys for mask in lengths):
        return KeyLengthMask(keys, keys)
    return KeyLengthMask(keys, _minimum(mask.queries for mask in lengths if mask.queries is not None))


def _minimum(values: Iterable[Any]) -> Any:
    """Return the least value, elementwise; None without values. Static values stay static."""

    def least(a, b):
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return (np if is_static((a, b)) else jnp).minimum(a, b)

    values = list(values)
    return reduce(least, values) if values else None


def _static_number(x: Index) -> Index:
    """Return a static scalar as an int, and a traced one unchanged."""
    return int(x) if is_static(x) else x


def zero_padding(mask: Mask | None, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Return the arrays with 0 in padding, which a part of the mask excludes from all pairs.

    As `dense.zero_masked`, it keeps a NaN in padding from the output and the gradients, but it does
    not evaluate the mask. The parts are those of the normal form: segment 0, lengths, causal masks
    and windows.
    """
    has_keys, has_queries = _used(normal_form(mask), query.shape[1], key.shape[1])
    for used in has_keys:
        query = jnp.where(used[..., None, None], query, 0)
    for used in has_queries:
        key, value = (jnp.where(used[..., None, None], x, 0) for x in (key, value))
    return query, key, value


def padding_is_all(mask: Mask | None, offset: BlockOffset, t: int, s: int) -> bool:
    """Return whether `zero_padding` is known to find every masked position.

    In self-attention it does if all positions but padding attend to themselves.
    """
    if mask is None:
        return True
    form = normal_form(mask)
    is_aligned = t == s and all(isinstance(i, int) and i == 0 for i in offset[2:])
    if not is_aligned or form.static_bounds is None or form.intervals or form.rest is not None:
        return False
    segments, lengths = form.segments, form.lengths
    if segments is not None and segments.queries is not segments.keys:
        return False
    # Queries after the last key may have keys, if no other part masks those.
    only_keys = lengths is not None and lengths.queries is None and segments is form.left is None
    if lengths is not None and lengths.queries is not lengths.keys and not only_keys:
        return False
    return all(bound is None or bound >= 0 for bound in form.static_bounds)


def _used(form: NormalForm, t: int, s: int) -> tuple[list[Array], list[Array]]:
    """Return which queries have keys, (b, T), and which keys have queries, (b, S)."""
    q, k = jnp.arange(t)[None], jnp.arange(s)[None]
    has_keys, has_queries = [], []
    if form.segments is not None:
        has_keys.append(jnp.asarray(form.segments.queries) > 0)
        has_queries.append(jnp.asarray(form.segments.keys) > 0)
    if form.lengths is not None:
        keys, num_queries = jnp.reshape(form.lengths.keys, (-1, 1)), form.lengths.queries
        queries = jnp.full((1, 1), t) if num_queries is None else jnp.reshape(num_queries, (-1, 1))
        has_keys += [] if num_queries is None else [(q < queries) & (keys > 0)]
        has_queries.append((k < keys) & (queries > 0))
    left, right = form.static_bounds or (None, None)
    if right is not None:
        has_keys += [q + right >= 0] if right < 0 else []
        has_queries += [k < t + right] if t + right < s else []
    if left is not None:
        has_keys += [q - left < s] if t - left > s else []
        has_queries += [k + left >= 0] if left < 0 else []
    return has_keys, has_queries


def is_static(tree: Any) -> bool:
    """Return whether no array in the tree is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def depends_on_batch_and_heads(mask: Mask) -> tuple[bool, bool]:
    """Return whether a mask depends on the batch row, and whether it depends on the head."""
    # Evaluate two rows and two heads, so that a dependence on their index shows in the shape.
    two, one = (0, 2), (0, 1)
    ranges = {"batch": two, "heads": two, "queries": one, "keys": one}
    # Shapes have no sharding, which a slice of two rows would not keep.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), mask)
    evaluated = jax.eval_shape(lambda x: x.slice_block(**ranges).evaluate(pair_indices(2, 2, 1, 1)), shapes)
    return evaluated.shape[0] > 1, evaluated.shape[1] > 1


def is_shared_by_rows(mask: Mask, by_heads: bool = False) -> bool:
    """Return whether a mask is static and equal for all rows, and for all heads if `by_heads`."""
    if not is_static(mask):
        return False
    rows, heads = depends_on_batch_and_heads(mask)
    return not rows and not (heads and by_heads)


def static_part(mask: Mask | None, offset: BlockOffset) -> tuple[Mask | None, bool]:
    """Return the conjunction of the static parts of a mask, and whether that is the whole mask.

    A part is static if it can be evaluated at trace time in a block with this offset.
    """
    if mask is None or not is_static(offset[2:]):
        return None, mask is None and is_static(offset[2:])

    def is_static_here(part):
        return is_static(part) and (is_static(offset[:2]) or not any(depends_on_batch_and_heads(part)))

    parts = list(conjuncts(mask))
    static = [part for part in parts if is_static_here(part)]
    if len(static) == len(parts):
        return mask, True
    return conjunction(*static), False
