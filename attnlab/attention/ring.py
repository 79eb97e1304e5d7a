"""Ring attention: keys and values pass from device to device, for a sequence sharded over devices.

In each step, the parts of a device's queries meet the parts of the keys that it holds. A meeting is
computed by `blockwise`, or on a TPU by the splash kernel; see `ring_kernel`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention.arrays import named_output, slice_at
from attnlab.attention.backends import vjp
from attnlab.attention.backends.blockwise import BlockedInputs, Blockwise, backward_blocks, blockwise
from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    apply_sinks,
    softmax_only_reason,
)
from attnlab.attention.backends.splash import Splash
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.context_parallel import ContextParallelBackend
from attnlab.attention.masks.basic import normal_form
from attnlab.attention.pairwise import BlockGrid
from attnlab.attention.ring_kernel import (
    EMPTY,
    Meeting,
    RingKernel,
    meeting_kind,
    merge_softmax,
    unsupported_part_reason,
)


class Ring(ContextParallelBackend):
    """Ring attention: keys and values pass from device to device (arXiv 2310.01889).

    With a mask other than segments, device i of n first exchanges halves so that it holds parts i
    and 2n - 1 - i of 2n. A causal mask then leaves every device the same work (zig-zag; Llama 3,
    arXiv 2407.21783, section 3.3.2).

    Attributes:
      splash: the kernel for meetings of queries and keys, where it supports them.
    """

    name = "ring"

    def __init__(self, splash: Splash | None = None):
        self.splash = splash or Splash()

    def unsupported_layout_reason(self, args):
        """See `ContextParallelBackend.unsupported_layout_reason`."""
        if reason := softmax_only_reason(args, dropout=True):
            return reason
        lengths = args.query.shape[1], args.key.shape[1]
        if any(n % 2 for n in lengths) and _uses_zigzag(args):
            return f"it exchanges halves of each device's shard, and the lengths {lengths} are not even"
        return None

    def part_lengths(self, args):
        """See `ContextParallelBackend.part_lengths`."""
        parts = _parts_per_device(args)
        return args.query.shape[1] // parts, args.key.shape[1] // parts

    def local_kernel(self, args):
        """See `ContextParallelBackend.local_kernel`."""
        reason = unsupported_part_reason(self.splash, args, self.part_lengths(args))
        return (Blockwise.name, {Splash.name: reason}) if reason else (Splash.name, {})

    def run(self, args, offset):
        """See `Backend.run`."""
        out, lse = self._attend(args, offset)
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))

    def _attend(self, args, offset) -> tuple[Array, Array]:
        """Return output and log-sum-exp of this device's queries, without sinks."""
        zigzag, axes = _uses_zigzag(args), args.sequence_axes
        kernel, scale, blocks, block_sizes = None, args.scale, None, None
        if self.local_kernel(args)[0] == Splash.name:
            kernel = RingKernel(self.splash, args, self.part_lengths(args), _parts_per_device(args))
            args = kernel.with_zeroed(args)
        elif args.block_mask is not None:
            block_sizes = args.block_mask.block_sizes
            blocks = jnp.stack(args.block_mask.to_dense())  # (2, B, H, Q, S)
        query, key, value = args.query, args.key, args.value
        if kernel is not None or not isinstance(scale, float):
            query, scale = query * scale, 1.0
        if kernel is not None:  # whose arrays have one dtype
            query = query.astype(key.dtype)
        values: Any = args.mask, args.score, args.dropout
        if zigzag:
            query, key, value = (zigzag_permute(x, axes) for x in (query, key, value))
            values = tuple(x if x is None else x.map_arrays(partial(_permute_rows, axes)) for x in values)
            blocks = None if blocks is None else zigzag_permute(blocks, axes, dimension=3)
        # Inside of `_ring`, the numbers of a mask are traced.
        bounds = normal_form(args.mask).static_bounds or (None, None)
        static = axes, zigzag, scale, block_sizes, kernel, bounds
        out, lse = _ring(static, query, key, value, *values, offset, blocks)
        if zigzag:
            out, lse = (zigzag_permute(x, axes, inverse=True) for x in (out, lse))
        return out, lse


def _uses_zigzag(args: AttentionArgs) -> bool:
    """Return whether the mask has a part other than segments, so that parts may differ in work."""
    return replace(normal_form(args.mask), segments=None).as_mask() is not None


def _parts_per_device(args: AttentionArgs) -> int:
    return 2 if _uses_zigzag(args) else 1


def _permute_rows(axes, x, dims):
    """Return an array of a mask or score in the order of the queries of `zigzag_permute`."""
    dimension = dims.index("queries") if "queries" in dims else None
    if dimension is None or x.shape[dimension] == 1:
        return x
    return zigzag_permute(x, axes, dimension=dimension)


def zigzag_permute(x: Array, axis, inverse: bool = False, dimension: int = 1) -> Array:
    """Exchange parts 2i and 2i + 1 of 2n on device i for parts i and 2n - 1 - i, or back.

    Args:
      x: the shard of this device.
      axis: the mesh axes that the length is sharded over.
      inverse: whether to restore the original order.
      dimension: the dimension of the length.
    """
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def holder(part):
        return part if part < n else 2 * n - 1 - part

    # The even parts go to n different devices, and so do the odd parts: one permutation for each.
    even, odd = ([(part // 2, holder(part)) for part in range(start, 2 * n, 2)] for start in (0, 1))
    first, second = jnp.split(x, 2, axis=dimension)
    is_swapped = me % 2 == 1  # on odd devices, the earlier part is the odd one
    if inverse:
        first, second = jnp.where(is_swapped, second, first), jnp.where(is_swapped, first, second)
        even, odd = ([(b, a) for a, b in pairs] for pairs in (even, odd))
    first, second = jax.lax.ppermute(first, axis, even), jax.lax.ppermute(second, axis, odd)
    if not inverse:
        first, second = jnp.where(is_swapped, second, first), jnp.where(is_swapped, first, second)
    return jnp.concatenate([first, second], axis=dimension)


class _RingState:
    """Indices and options of the query and key parts that this device computes in a ring step."""

    def __init__(self, static, query, key, mask, score, dropout, offset, blocks):
        self.axis, self.zigzag, self.scale, self.block_sizes, self.kernel, self.bounds = static
        self.n, self.me = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        self.count = 2 if self.zigzag else 1
        self.sizes = query.shape[1] // self.count, key.shape[1] // self.count
        self.mask, self.score, self.dropout = mask, score, dropout
        self.offset, self.blocks = offset, blocks

    def part_index(self, owner, half: int):
        """Return the index of a half of `owner`'s shard among all parts of the sequence."""
        if not self.zigzag:
            return owner
        return owner if half == 0 else 2 * self.n - 1 - owner

    def meeting(self, owner, steps: range, i: int, j: int) -> Meeting:
        """Return the meeting of half i of this device's queries and half j of `owner`'s keys."""
        parts = self.part_index(self.me, i), self.part_index(owner, j)
        starts = tuple(part * size for part, size in zip(parts, self.sizes, strict=True))
        # Arrays along "queries" are shards of this device.
        at = {"queries": i * self.sizes[0], "keys": starts[1]}
        ranges = {name: (start, size) for (name, start), size in zip(at.items(), self.sizes, strict=True)}
        values = self.mask, self.score, self.dropout
        possible = {
            (self.part_index(me, i), self.part_index((me - step) % self.n, j))
            for me in range(self.n)
            for step in steps
        }
        mask, score, dropout = (x if x is None else x.slice_block(**ranges) for x in values)
        return Meeting(mask, score, dropout, starts, at, parts, possible, i)

    def is_empty(self, meeting: Meeting) -> bool:
        """Return whether the bounds of the mask leave no pair of a meeting on any device."""
        distances = (kv * self.sizes[1] - q * self.sizes[0] for q, kv in meeting.possible)
        return all(meeting_kind(self.bounds, self.sizes, x) == EMPTY for x in distances)

    def attend(self, state, query, key, value, meeting: Meeting):
        """Return output and log-sum-exp of a part of the queries with those of a meeting merged."""
        if self.is_empty(meeting):
            return state
        if self.kernel is not None:
            return self.kernel.attend(state, query, key, value, meeting)
        return merge_softmax(state, blockwise(query, key, value, **self.options(meeting)))

    def gradients(self, sums, query, key, value, d_out, lse, delta, meeting: Meeting):
        """Return `sums`, of d_query, d_key and d_value, with those of a meeting, and d_score.

        d_score is None if the meeting is empty or has no score.
        """
        if self.is_empty(meeting):
            return sums, None
        arrays = query, key, value, d_out, lse, delta
        if self.kernel is not None:
            return self.kernel.gradients(sums, *arrays, meeting), None
        *grads, d_score = _blockwise_gradients(*arrays, **self.options(meeting))
        return tuple(x + y for x, y in zip(sums, grads, strict=True)), d_score

    def options(self, meeting: Meeting) -> dict[str, Any]:
        """Return the options of `blockwise` for a meeting."""
        b, h, q0, k0 = self.offset
        q, k = meeting.starts
        return {
            "mask": meeting.mask,
            "score": meeting.score,
            "dropout": meeting.dropout,
            "scale": self.scale,
            "offset": (b, h, q0 + q, k0 + k),
            "block_mask": self.block_mask(meeting.half, k),
        }

    def block_mask(self, i: int, k) -> BlockMask | None:
        """Return the blocks of half i of this device's queries and the part of the keys from k."""
        if self.blocks is None:
            return None
        grid = BlockGrid(*self.sizes, *self.block_sizes)
        count, width = grid.num_blocks
        start = 0, 0, 0, i * count, k // grid.block_kv
        partial_, full = slice_at(self.blocks, start, (*self.blocks.shape[:3], count, width))
        return BlockMask.from_partial_and_full(partial_, full, grid)

    def halves(self, *arrays):
        """Return the halves of several arrays, or the whole arrays without zig-zag."""
        return list(zip(*(jnp.split(x, self.count, axis=1) for x in arrays), strict=True))

    def ring_scan(self, carry, step, key, value):
        """Scan `step(carry, owner, steps, key, value)` over all owners. It returns carry and sums.

        The keys and values of the next owner are sent while those of this one are used: n - 1
        times. The sums that belong to keys and values travel one step behind them, also during the
        next step, and then to their owner: n times. `steps` are the numbers of the steps that the
        traced step may be.

        Returns:
          The carry, and the sums of this device's own keys and values.
        """

        # Keys and values are one array, and their sums another: of four sends in a step, XLA for
        # TPUs would start two after the last kernel.
        def send(packed):
            next_device = [(d, (d + 1) % self.n) for d in range(self.n)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, next_device), packed)

        def turn(state, i, steps):
            carry, keys, sums = state
            arrived = send(sums)
            carry, own = step(carry, (self.me - i) % self.n, steps, *_unpack(keys, key, value))
            return carry, jax.tree.map(jnp.add, arrived, _pack(own))

        def rotate(state, i):
            next_keys = send(state[1])
            carry, sums = turn(state, i, range(1, last))
            return (carry, next_keys, sums), None

        last, next_keys = self.n - 1, send(_pack((key, value)))
        carry, sums = step(carry, self.me, range(1), key, value)
        state = carry, next_keys, _pack(sums)
        if last > 1:
            state, _ = jax.lax.scan(rotate, state, jnp.arange(1, last))
        carry, sums = turn(state, last, range(last, self.n))
        return carry, _unpack(send(sums), key, value)


def _pack(arrays: tuple[Array, Array] | None) -> Array | None:
    """Return an array of keys and one of values as one array, in their common dtype."""
    return None if arrays is None else jnp.concatenate(arrays, axis=-1)


def _unpack(packed: Array | None, key: Array, value: Array) -> Any:
    """Return the arrays of `_pack`, with the widths and dtypes of `key` and `value`."""
    if packed is None:
        return None
    keys, values = jnp.split(packed, [key.shape[-1]], axis=-1)
    return keys.astype(key.dtype), values.astype(value.dtype)


def _blockwise_gradients(query, key, value, d_out, lse, delta, *, mask, score, dropout, **options):
    """Return gradients of attention to a subset of the keys, given the log-sum-exp of all keys.

    `d_out` is the gradient of the output. `lse` is the log-sum-exp over all keys, including those
    that are not in `key`, and `delta` is `vjp.row_term` of the output over all keys. The other
    arguments are those of `blockwise`.

    Returns:
      The gradients of query, key and value, in float32, and of the score. Those of query and score
      are the contributions of these keys.
    """
    values = mask, score, dropout
    inputs = BlockedInputs(query.shape, key.shape, values, **options)
    rows = (inputs.group_heads(x) for x in (d_out, lse, delta))
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    d_query, d_key, d_value, d_score = backward_blocks(inputs.static, *arrays, inputs.values, *rows)
    s = key.shape[1]
    d_key, d_value = (jnp.swapaxes(x, 1, 2)[:, :s] for x in (d_key, d_value))
    return inputs.ungroup_heads(d_query), d_key, d_value, vjp.finalize(score, d_score)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, query, key, value, mask, score, dropout, offset, blocks):
    return _ring_forward(static, query, key, value, mask, score, dropout, offset, blocks)[0]


def _ring_forward(static, query, key, value, mask, score, dropout, offset, blocks):
    ring = _RingState(static, query, key, mask, score, dropout, offset, blocks)

    def step(carry, owner, steps, key, value):
        results = []
        for i, ((q,), state) in enumerate(zip(ring.halves(query), carry, strict=True)):
            for j, (k, v) in enumerate(ring.halves(key, value)):
                state = ring.attend(state, q, k, v, ring.meeting(owner, steps, i, j))
            results.append(state)
        return results, None

    rows = (*query.shape[:1], ring.sizes[0], query.shape[2])
    start = (jnp.zeros((*rows, value.shape[-1])), jnp.full(rows, -jnp.inf))
    carry, _ = ring.ring_scan([start] * ring.count, step, key, value)
    out, lse = (jnp.concatenate(parts, axis=1) for parts in zip(*carry, strict=True))
    out, lse = named_output(out, lse)
    return (out.astype(value.dtype), lse), (query, key, value, mask, score, dropout, offset, blocks, out, lse)


def _ring_backward(static, residuals, d_outputs):
    query, key, value, mask, score, dropout, offset, blocks, out, lse = residuals
    d_out, d_lse = d_outputs
    delta = vjp.row_term(out, d_out, d_lse)
    ring = _RingState(static, query, key, mask, score, dropout, offset, blocks)
    q_halves = ring.halves(query, d_out, lse, delta)

    def step(carry, owner, steps, key, value):
        d_queries, d_score = carry
        d_queries, k_parts = list(d_queries), ring.halves(key, value)
        # The sums stay in float32: rounding them to bfloat16 in each of n steps would add n errors.
        d_parts = [tuple(jnp.zeros(x.shape) for x in part) for part in k_parts]
        for i, (q, *rows) in enumerate(q_halves):
            for j, (k, v) in enumerate(k_parts):
                meeting = ring.meeting(owner, steps, i, j)
                (d_queries[i], *d_parts[j]), d_score_block = ring.gradients(
                    (d_queries[i], *d_parts[j]), q, k, v, *rows, meeting
                )
                if d_score_block is not None:
                    d_score = vjp.accumulate_block(score, d_score, d_score_block, **meeting.at)
        d_key, d_value = (jnp.concatenate(x, axis=1) for x in zip(*d_parts, strict=True))
        return (d_queries, d_score), (d_key, d_value)

    zeros = [jnp.zeros(q.shape) for q, *_ in q_halves], vjp.init(score)
    (d_queries, d_score), (d_key, d_value) = ring.ring_scan(zeros, step, key, value)
    d_query = jnp.concatenate(d_queries, axis=1)
    grads = [g.astype(x.dtype) for x, g in zip((query, key, value), (d_query, d_key, d_value), strict=True)]
    d_mask, *d_others = (vjp.zero_cotangent(x) for x in (mask, dropout, offset, blocks))
    return (*grads, d_mask, vjp.finalize(score, d_score), *d_others)


_ring.defvjp(_ring_forward, _ring_backward)
