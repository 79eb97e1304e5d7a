"""Normal form of a mask: a conjunction of the parts that kernels support, and the rest.

Every backend reads the masks that it supports from the normal form, and the padding. The functions
that tell which parts of a mask are static, that is, not traced, are here as well.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention.masks.base import AndMask, Mask
from attnlab.attention.masks.basic import CausalMask, SegmentMask, WindowMask
from attnlab.attention.masks.intervals import IntervalMask, KeyLengthMask
from attnlab.attention.pairwise import BlockOffset, Index, pair_indices


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


# Positions at which `is_causal` evaluates a mask: the first 64, and those around powers of two.
PROBED = np.unique([*range(64), *(2**n + i for n in range(6, 17) for i in (-1, 0, 1))])
PROBED_ROWS, PROBED_HEADS = 2, 64


def is_causal(mask: Mask | None) -> bool:
    """Return whether no query attends to a later key, for queries and keys in the same positions.

    The bounds of the normal form tell it for a mask of `causal` and `window`. Another mask is
    evaluated for all pairs of `PROBED` positions: 10 thousand, times 2 rows and 64 heads if it
    depends on them. A mask that holds an array over queries or keys is evaluated for all its pairs.

    Args:
      mask: a static mask.
    """
    form = normal_form(mask)
    if isinstance(form.right, int) and form.right <= 0:
        return True
    if mask is None or form.is_relative:
        return False
    lengths = _array_lengths(mask)
    default = np.arange(max(lengths.values())) if lengths else PROBED
    q, kv = (np.arange(lengths[name]) if name in lengths else default for name in ("queries", "keys"))
    by_row, by_head = depends_on_batch_and_heads(mask)
    rows, heads = np.arange(PROBED_ROWS if by_row else 1), np.arange(PROBED_HEADS if by_head else 1)
    at = pair_indices(*map(jnp.asarray, (rows, heads, q, kv)))
    return not (mask.evaluate(at) & (at.kv > at.q)).any().item()


def _array_lengths(mask: Mask) -> dict[str, int]:
    """Return the numbers of "queries" and "keys" of the arrays that a mask holds."""
    lengths: dict[str, int] = {}

    def add(x, dims):
        lengths.update({name: n for name, n in zip(dims, jnp.shape(x), strict=True) if n > 1})
        return x

    mask.map_arrays(add)
    return {name: n for name, n in lengths.items() if name in ("queries", "keys")}


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
