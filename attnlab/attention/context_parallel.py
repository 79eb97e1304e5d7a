"""Context parallelism: attention over a sequence sharded over devices, as three backends.

All three run inside `shard_map`. Device i holds the i-th shard of the length. Masks and scores are
replicated along the length and are sliced to the queries and keys that a device computes.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention.arrays import slice_at
from attnlab.attention.backends import vjp
from attnlab.attention.backends.blockwise import blockwise, blockwise_gradients, default_block_sizes
from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    apply_sinks,
    softmax_only_reason,
)
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.masks.normal_form import normal_form
from attnlab.attention.pairwise import BlockGrid


class ContextParallelBackend:
    """Base class of the backends for a sharded length."""

    name: str

    def unsupported_reason(self, args: AttentionArgs):
        """See `Backend.unsupported_reason`."""
        if not args.sequence_axes:
            return "the length is not sharded"
        return softmax_only_reason(args, dropout=True) or self.unsupported_layout_reason(args)

    def unsupported_layout_reason(self, args: AttentionArgs) -> str | None:
        """Return why the backend does not support the sharded shapes, or None."""
        del args
        return None

    def block_sizes(self, args: AttentionArgs) -> tuple[int, int] | None:
        """Return the sizes of blocks that divide the parts of the sequence; see `Backend`."""
        parts = self.part_lengths(args)
        sizes = default_block_sizes(*parts, args.mask)
        return sizes if all(n % size == 0 for n, size in zip(parts, sizes, strict=True)) else None

    def part_lengths(self, args: AttentionArgs) -> tuple[int, int]:
        """Return the numbers of queries and keys that a block mask must divide into blocks."""
        return args.query.shape[1], args.key.shape[1]

    def run(self, args: AttentionArgs, offset):
        """See `Backend.run`."""
        out, lse = self.attend_local(args, offset)
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))

    def attend_local(self, args: AttentionArgs, offset) -> tuple[Array, Array]:
        """Return output and log-sum-exp of this device's queries."""
        raise NotImplementedError


class AllGather(ContextParallelBackend):
    """All-gather of keys and values to every device (Llama 3, arXiv 2407.21783, section 3.3.2)."""

    name = "all_gather"

    def attend_local(self, args, offset):
        """See `ContextParallelBackend.attend_local`."""
        key, value = (
            jax.lax.all_gather(x, args.sequence_axes, axis=1, tiled=True) for x in (args.key, args.value)
        )
        start = offset[2] + jax.lax.axis_index(args.sequence_axes) * args.query.shape[1]
        options = _slice_options(args, queries=(start, args.query.shape[1]))
        at = (*offset[:2], start, offset[3])
        options |= {"scale": args.scale, "block_mask": args.block_mask}
        return blockwise(args.query, key, value, offset=at, **options)


class AllToAll(ContextParallelBackend):
    """All-to-all from shards of the length to shards of the heads, and back.

    DeepSpeed Ulysses, arXiv 2309.14509, section 3.
    """

    name = "all_to_all"

    def unsupported_layout_reason(self, args):
        """See `ContextParallelBackend.unsupported_layout_reason`."""
        heads, count = args.key.shape[2], args.sequence_shards
        if heads % count:
            return f"{heads} key heads per device are not divisible by {count} devices"
        return None

    def attend_local(self, args, offset):
        """See `ContextParallelBackend.attend_local`."""
        swap = partial(jax.lax.all_to_all, axis_name=args.sequence_axes, tiled=True)
        query, key, value = (swap(x, split_axis=2, concat_axis=1) for x in (args.query, args.key, args.value))
        start = jax.lax.axis_index(args.sequence_axes) * query.shape[2]
        options = _slice_options(args, heads=(start, query.shape[2])) | {"scale": args.scale}
        at = (offset[0], offset[1] + start, *offset[2:])
        options["block_mask"] = _of_heads(args.block_mask, args.sequence_axes)
        out, lse = blockwise(query, key, value, offset=at, **options)
        return swap(out, split_axis=1, concat_axis=2), swap(lse, split_axis=1, concat_axis=2)


def _of_heads(block_mask: BlockMask | None, axes) -> BlockMask | None:
    """Return the block mask of all queries and this device's heads; None if they share lists."""
    if block_mask is None:
        return None
    count = jax.lax.axis_size(axes)
    if block_mask.num_lists[1] % count and block_mask.num_lists[1] > 1:
        return None

    def change(x, dims):
        if "q_blocks" in dims:
            x = jax.lax.all_gather(x, axes, axis=2, tiled=True)
        if x.shape[1] == 1:
            return x
        heads = x.shape[1] // count
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * heads, heads, 1)

    return block_mask.map_arrays(change)


class Ring(ContextParallelBackend):
    """Ring attention: keys and values pass from device to device (arXiv 2310.01889).

    With a mask other than segments, device i of n first exchanges halves so that it holds parts i
    and 2n - 1 - i of 2n. A causal mask then leaves every device the same work (zig-zag; Llama 3,
    arXiv 2407.21783, section 3.3.2).
    """

    name = "ring"

    def unsupported_layout_reason(self, args):
        """See `ContextParallelBackend.unsupported_layout_reason`."""
        lengths = args.query.shape[1], args.key.shape[1]
        if any(n % 2 for n in lengths) and _uses_zigzag(args):
            return f"it exchanges halves of each device's shard, and the lengths {lengths} are not even"
        return None

    def part_lengths(self, args):
        """See `ContextParallelBackend.part_lengths`."""
        parts = 2 if _uses_zigzag(args) else 1
        return args.query.shape[1] // parts, args.key.shape[1] // parts

    def attend_local(self, args, offset):
        """See `ContextParallelBackend.attend_local`."""
        query, key, value = args.query, args.key, args.value
        zigzag = _uses_zigzag(args)
        if zigzag:
            query, key, value = (zigzag_permute(x, args.sequence_axes) for x in (query, key, value))
        blocks, sizes = None, None
        if args.block_mask is not None:
            sizes = args.block_mask.block_sizes
            blocks = jnp.stack(args.block_mask.to_dense())  # (2, B, H, Q, S)
            if zigzag:
                blocks = jnp.moveaxis(zigzag_permute(jnp.moveaxis(blocks, 3, 1), args.sequence_axes), 1, 3)
        static = args.sequence_axes, zigzag, args.scale if isinstance(args.scale, float) else 1.0, sizes
        if not isinstance(args.scale, float):
            query = query * args.scale
        out, lse = _ring(static, query, key, value, args.mask, args.score, args.dropout, offset, blocks)
        if zigzag:
            out, lse = (zigzag_permute(x, args.sequence_axes, inverse=True) for x in (out, lse))
        return out, lse


def _uses_zigzag(args: AttentionArgs) -> bool:
    """Return whether the mask has a part other than segments, so that parts may differ in work."""
    return replace(normal_form(args.mask), segments=None).as_mask() is not None


def _slice_options(values, **ranges) -> dict:
    """Return mask, score and dropout of `values`, sliced, as arguments of `blockwise`."""
    options = {name: getattr(values, name) for name in ("mask", "score", "dropout")}
    return {name: x if x is None else x.slice_block(**ranges) for name, x in options.items()}


def zigzag_permute(x: Array, axis, inverse: bool = False) -> Array:
    """Exchange parts 2i and 2i + 1 of 2n on device i for parts i and 2n - 1 - i, or back.

    Args:
      x: the shard of this device, split along its second axis.
      axis: the mesh axes that the length is sharded over.
      inverse: whether to restore the original order.
    """
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def holder(part):
        return part if part < n else 2 * n - 1 - part

    # The even parts go to n different devices, and so do the odd parts: one permutation for each.
    even, odd = ([(part // 2, holder(part)) for part in range(start, 2 * n, 2)] for start in (0, 1))
    first, second = jnp.split(x, 2, axis=1)
    is_swapped = me % 2 == 1  # on odd devices, the earlier part is the odd one
    if inverse:
        first, second = jnp.where(is_swapped, second, first), jnp.where(is_swapped, first, second)
        even, odd = ([(b, a) for a, b in pairs] for pairs in (even, odd))
    first, second = jax.lax.ppermute(first, axis, even), jax.lax.ppermute(second, axis, odd)
    if not inverse:
        first, second = jnp.where(is_swapped, second, first), jnp.where(is_swapped, first, second)
    return jnp.concatenate([first, second], axis=1)


class _RingState:
    """Indices and options of the query and key parts that this device computes in a ring step."""

    def __init__(self, static, query, key, mask, score, dropout, offset, blocks):
        self.axis, self.zigzag, self.scale, self.block_sizes = static
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

    def blockwise_options(self, owner, i: int, j: int):
        """Return start indices and `blockwise` options for two halves.

        They are half i of this device's queries and half j of `owner`'s keys.
        """
        q, k = self.part_index(self.me, i) * self.sizes[0], self.part_index(owner, j) * self.sizes[1]
        ranges = {"queries": (q, self.sizes[0]), "keys": (k, self.sizes[1])}
        b, h, q0, k0 = self.offset
        return {"queries": q, "keys": k}, _slice_options(self, **ranges) | {
            "scale": self.scale,
            "offset": (b, h, q0 + q, k0 + k),
            "block_mask": self.block_mask(i, k),
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

    def ring_scan(self, carry, step, keys, sums=()):
        """Scan `step(carry, owner, keys, sums)`, which returns carry and sums, over all owners.

        The keys and values of the next owner are sent while those of this one are used: n - 1
        times. The sums travel with them, after each step, and arrive at their owner: n times.

        Returns:
          The carry, and the sums of this device's own keys.
        """

        def send(arrays):
            next_device = [(d, (d + 1) % self.n) for d in range(self.n)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, next_device), arrays)

        def rotate(state, i):
            carry, keys, sums = state
            next_keys = send(keys)
            carry, sums = step(carry, (self.me - i) % self.n, keys, sums)
            return (carry, next_keys, send(sums)), None

        last = self.n - 1
        (carry, keys, sums), _ = jax.lax.scan(rotate, (carry, keys, sums), jnp.arange(last))
        carry, sums = step(carry, (self.me - last) % self.n, keys, sums)
        return carry, send(sums)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, query, key, value, mask, score, dropout, offset, blocks):
    return _ring_forward(static, query, key, value, mask, score, dropout, offset, blocks)[0]


def _ring_forward(static, query, key, value, mask, score, dropout, offset, blocks):
    ring = _RingState(static, query, key, mask, score, dropout, offset, blocks)

    def step(carry, owner, keys, sums):
        results = []
        for i, ((q,), state) in enumerate(zip(ring.halves(query), carry, strict=True)):
            for j, (k, v) in enumerate(ring.halves(*keys)):
                _, options = ring.blockwise_options(owner, i, j)
                state = _merge_softmax(state, blockwise(q, k, v, **options))
            results.append(state)
        return results, sums

    rows = (*query.shape[:1], ring.sizes[0], query.shape[2])
    start = (jnp.zeros((*rows, value.shape[-1])), jnp.full(rows, -jnp.inf))
    carry, _ = ring.ring_scan([start] * ring.count, step, (key, value))
    out, lse = (jnp.concatenate(parts, axis=1) for parts in zip(*carry, strict=True))
    out, lse = vjp.named_output(out, lse)
    return (out.astype(value.dtype), lse), (query, key, value, mask, score, dropout, offset, blocks, out, lse)


def _merge_softmax(left, right):
    """Combine softmax outputs over two disjoint sets of keys (arXiv 2307.08691, section 2.3)."""
    (out_1, lse_1), (out_2, lse_2) = left, right
    lse = jnp.logaddexp(lse_1, lse_2)
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    weights = [jnp.exp(x - finite_lse)[..., None] for x in (lse_1, lse_2)]
    return out_1 * weights[0] + out_2.astype(vjp.wide(out_2)) * weights[1], lse


def _ring_backward(static, residuals, d_outputs):
    query, key, value, mask, score, dropout, offset, blocks, out, lse = residuals
    d_out, d_lse = d_outputs
    delta = vjp.row_term(out, d_out, d_lse)
    ring = _RingState(static, query, key, mask, score, dropout, offset, blocks)
    q_halves = ring.halves(query, d_out, lse, delta)

    def step(carry, owner, keys, sums):
        d_queries, d_score = carry
        k_parts, d_parts = ring.halves(*keys), ring.halves(*sums)
        d_queries, d_parts = list(d_queries), [list(x) for x in d_parts]
        for i, (q, d_out_i, lse_i, delta_i) in enumerate(q_halves):
            for j, (k, v) in enumerate(k_parts):
                starts, options = ring.blockwise_options(owner, i, j)
                d_q, d_k, d_v, d_score_block = blockwise_gradients(
                    q, k, v, d_out_i, lse_i, delta_i, **options
                )
                d_queries[i] += d_q
                d_parts[j][0] += d_k
                d_parts[j][1] += d_v
                d_score = vjp.accumulate_block(score, d_score, d_score_block, **starts)
        d_key, d_value = (jnp.concatenate(x, axis=1) for x in zip(*d_parts, strict=True))
        return (d_queries, d_score), (d_key, d_value)

    zeros = [jnp.zeros(q.shape) for q, *_ in q_halves], vjp.init(score)
    # The sums stay in float32: rounding them to bfloat16 after each of n steps would add n errors.
    sums = jnp.zeros(key.shape), jnp.zeros(value.shape)
    (d_queries, d_score), (d_key, d_value) = ring.ring_scan(zeros, step, (key, value), sums)
    d_query = jnp.concatenate(d_queries, axis=1)
    grads = [g.astype(x.dtype) for x, g in zip((query, key, value), (d_query, d_key, d_value), strict=True)]
    d_mask, *d_others = (vjp.zero_cotangent(x) for x in (mask, dropout, offset, blocks))
    return (*grads, d_mask, vjp.finalize(score, d_score), *d_others)


_ring.defvjp(_ring_forward, _ring_backward)
