"""The splash kernel in ring attention: it computes the meetings of parts of queries and keys.

A causal mask or a window allows the pairs of a meeting by the distance between its first query and
its first key. A meeting is empty or full, or one of a few partial kinds, such as the diagonal of a
causal mask. Each kind has a kernel. The index of the device is traced, and so is the kind: a branch
selects the kernel at run time. Segments and lengths are passed as segment ids.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.arrays import wide
from attnlab.attention.backends.registry import AttentionArgs, refusal
from attnlab.attention.backends.splash import Splash
from attnlab.attention.backends.splash_blocks import max_block_size
from attnlab.attention.backends.tpu_layout import Pair, kernel_block_sizes, round_up
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.fallback import kernel_scope
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import NormalForm, normal_form, zero_padding
from attnlab.attention.masks.intervals import KeyLengthMask
from attnlab.attention.scores import Score

# Output (B, T, H, D) in float32 and log-sum-exp (B, T, H) of a part of the queries.
State = tuple[Array, Array]


Bounds = tuple[int | None, int | None]  # `NormalForm.static_bounds`
EMPTY, FULL = "empty", "full"


class Meeting(NamedTuple):
    """A part of the queries and a part of the keys, in a step of a ring.

    Attributes:
      mask: the mask, sliced to the meeting.
      score: the score, likewise.
      dropout: the dropout, likewise.
      starts: indices of the first query and key among those of all devices.
      at: starts of the slices in the arrays of this device.
      parts: indices of the parts of queries and keys among those of all devices.
      possible: the parts of all devices in all steps that this may be.
      half: which half of this device's queries this is.
    """

    mask: Mask | None
    score: Score | None
    dropout: AttentionDropout | None
    starts: tuple[Any, ...]
    at: dict[str, Any]
    parts: tuple[Any, Any]
    possible: set[tuple[int, int]]
    half: int


def meeting_kind(bounds: Bounds, lengths: Pair, distance: int) -> str | int:
    """Return the kind of a meeting: `EMPTY`, `FULL`, or `distance` if it is partial.

    Args:
      bounds: numbers of keys before and after a query to which it attends; None means all.
      lengths: numbers of queries and keys of the meeting.
      distance: index of its first key minus that of its first query, among all keys and queries.
    """
    left, right = _shift(bounds, distance)
    last_query, last_key = (n - 1 for n in lengths)
    if (right is not None and right < -last_query) or (left is not None and left < -last_key):
        return EMPTY
    if (right is None or right >= last_key) and (left is None or left >= last_query):
        return FULL
    return distance


def _shift(bounds: Bounds, distance: int) -> Bounds:
    """Return the bounds in a meeting at this distance, in which indices count from its start."""
    left, right = bounds
    return None if left is None else left + distance, None if right is None else right - distance


def unsupported_part_reason(splash: Splash, args: AttentionArgs, part_lengths: Pair) -> str | None:
    """Return why the kernel does not support the meetings of parts of these lengths, or None."""
    form = normal_form(args.mask)
    if form.static_bounds is None or form.intervals or form.rest is not None:
        return "in a ring, the only masks it supports are causal(), window(), segments() and key_lengths()"
    if form.static_bounds != (None, None) and args.query.shape[1] != args.key.shape[1]:
        return "in a ring, its causal() and window() need as many queries as keys"
    return refusal(splash, _part(args, part_lengths))


def _part(args: AttentionArgs, part_lengths: Pair) -> AttentionArgs:
    """Return the arguments of a meeting, without its mask."""

    def shape(x, length):
        return jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)

    arrays = {"query": shape(args.query, part_lengths[0])}
    arrays |= {name: shape(getattr(args, name), part_lengths[1]) for name in ("key", "value")}
    return replace(args, **arrays, mask=None, sequence_axes=(), sequence_shards=1)


class RingKernel:
    """The kernels of one call of ring attention.

    Attributes:
      lengths: numbers of queries and keys of a part.
      padded: the lengths, rounded up to whole blocks.
      kernels: a kernel for each kind of meetings; None for an empty one.
      kinds: index of the kind of each meeting, by its parts of queries and keys.
    """

    def __init__(self, splash: Splash, args: AttentionArgs, part_lengths: Pair, parts_per_device: int):
        from attnlab.attention.backends import splash_kernel  # deferred: imports Pallas

        form, part = normal_form(args.mask), _part(args, part_lengths)
        self.has_ids = form.segments is not None or form.lengths is not None
        block_sizes = kernel_block_sizes(part, splash.max_block_size or max_block_size(part, self.has_ids))
        self.lengths, self.padded = part_lengths, round_up(part_lengths, block_sizes)
        score: Any = args.score
        options = {"softcap": None if score is None else score.cap, "interpret": splash.interpret}
        count = args.sequence_shards * parts_per_device
        bounds = form.static_bounds
        assert bounds is not None
        names: list[str | int] = []
        self.kinds = np.zeros((count, count), int)
        for q, kv in np.ndindex(count, count):
            kind = meeting_kind(bounds, part_lengths, kv * part_lengths[1] - q * part_lengths[0])
            names += [] if kind in names else [kind]
            self.kinds[q, kv] = names.index(kind)

        def make(kind: str | int):
            if kind == EMPTY:
                return None
            mask = None if isinstance(kind, str) else NormalForm(*_shift(bounds, kind)).as_mask()
            return splash_kernel.static_kernel(
                mask, args.query.shape[2], part_lengths, block_sizes, **options
            )

        self.kernels = list(map(make, names))

    def with_zeroed(self, args: AttentionArgs) -> AttentionArgs:
        """Return the arguments with 0 in padding, which the ids exclude."""
        if not self.has_ids:
            return args
        mask, me = args.mask, jax.lax.axis_index(args.sequence_axes)
        assert mask is not None
        t, s = args.query.shape[1], args.key.shape[1]
        # A length counts from the start of the shard of queries, or from that of the shard of keys.
        q_ids, kv_ids = (_ids_of(mask.slice_block(keys=(me * s, s)), x) for x in ((me * t, 0), (0, me * s)))
        arrays = args.query, args.key, args.value
        query, _, _ = zero_padding(q_ids.as_mask(), *arrays)
        _, key, value = zero_padding(kv_ids.as_mask(), *arrays)
        return replace(args, query=query, key=key, value=value)

    def attend(
        self,
        state: State,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K Dv"],
        meeting: Meeting,
    ) -> State:
        """Return output and log-sum-exp with those of a meeting merged; the query is scaled."""
        from attnlab.attention.backends import splash_kernel

        def merge(kernel, state, ids, arrays):
            result = splash_kernel.forward(kernel, *arrays, ids, None)
            out, lse = (jnp.swapaxes(x, 1, 2)[:, : self.lengths[0]] for x in result)
            return merge_softmax(state, (out, lse))

        arrays = self._to_kernel(query), self._to_kernel(key, 1), self._to_kernel(value, 1)
        return self._switch(merge, meeting, state, arrays)

    def gradients(self, sums, query, key, value, d_out, lse, delta, meeting: Meeting):
        """Return sums of the gradients of query, key and value, with those of a meeting.

        `d_out` is the gradient of the output. `lse` is the log-sum-exp over all keys, including
        those that are not in `key`, and `delta` is `vjp.row_term` of the output over all keys.
        """
        from attnlab.attention.backends import splash_kernel

        def add(kernel, sums, ids, arrays):
            grads = splash_kernel.gradients(kernel, *arrays, ids, None)
            grads = (jnp.swapaxes(x, 1, 2)[:, : y.shape[1]] for x, y in zip(grads, sums, strict=True))
            return tuple(x + y for x, y in zip(sums, grads, strict=True))

        lse = jnp.where(jnp.isneginf(lse), 0, lse)  # a padded row has no gradient
        arrays = [self._to_kernel(query), self._to_kernel(key, 1), self._to_kernel(value, 1)]
        arrays += map(self._to_kernel, (d_out, lse, delta))
        return self._switch(add, meeting, tuple(sums), tuple(arrays))

    def _switch(self, function: Callable, meeting: Meeting, state: Any, arrays: tuple[Array, ...]) -> Any:
        """Return `function(kernel, state, ids, arrays)`, or `state` if the meeting is empty."""
        ids = self._segment_ids(meeting, len(arrays[0]))
        kinds = sorted({self.kinds[parts] for parts in meeting.possible})

        def branch(kind):
            kernel = self.kernels[kind]
            if kernel is None:
                return lambda state, ids, arrays: state
            return lambda state, ids, arrays: function(kernel, state, ids, arrays)

        with jax.named_scope(kernel_scope(Splash.name)):
            if len(kinds) == 1:
                return branch(kinds[0])(state, ids, arrays)
            index = jnp.asarray(np.searchsorted(kinds, self.kinds))[meeting.parts]
            return jax.lax.switch(index, [branch(kind) for kind in kinds], state, ids, arrays)

    def _segment_ids(self, meeting: Meeting, batch: int):
        from attnlab.attention.backends import splash_kernel

        ids = _ids_of(meeting.mask, meeting.starts)
        return splash_kernel.segment_ids(ids, batch, self.lengths, self.padded)

    def _to_kernel(self, x: Array, axis: int = 0) -> Array:
        """Return (B, T, H, ...) as (B, H, T', ...), T' padded to whole blocks."""
        padding = self.padded[axis] - self.lengths[axis]
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, padding if i == 2 else 0) for i in range(x.ndim)])


def _ids_of(mask: Mask | None, starts) -> NormalForm:
    """Return the segments and lengths of a mask sliced to a meeting, with indices from 0."""
    form = normal_form(mask)
    lengths = form.lengths
    if lengths is not None:
        queries = None if lengths.queries is None else lengths.queries - starts[0]
        lengths = KeyLengthMask(lengths.keys - starts[1], queries)
    return NormalForm(segments=form.segments, lengths=lengths)


def merge_softmax(left: State, right: State) -> State:
    """Combine softmax outputs over two disjoint sets of keys (arXiv 2307.08691, section 2.3)."""
    (out_1, lse_1), (out_2, lse_2) = left, right
    lse = jnp.logaddexp(lse_1, lse_2)
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    weights = [jnp.exp(x - finite_lse)[..., None] for x in (lse_1, lse_2)]
    return out_1 * weights[0] + out_2.astype(wide(out_2)) * weights[1], lse
