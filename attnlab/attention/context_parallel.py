"""Context parallelism: attention over a sequence sharded over devices.

The backends run inside `shard_map`. Device i holds the i-th shard of the queries and of the keys,
and of the arrays of masks and scores along "queries". Along "keys" these arrays are whole. The
third backend is in `ring`.
"""

from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax

from attnlab.attention.backends.blockwise import Blockwise
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    Backend,
    select_backend,
    softmax_only_reason,
)
from attnlab.attention.block_mask import BlockMask, default_block_sizes
from attnlab.attention.fallback import kernel_scope
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import PairwiseFn

Pairwise = TypeVar("Pairwise", bound=PairwiseFn | None)


class ContextParallelBackend:
    """Base class of the backends for a sharded length."""

    name: str

    def unsupported_reason(self, args: AttentionArgs):
        """See `Backend.unsupported_reason`."""
        if not args.sequence_axes:
            return "the length is not sharded"
        any_normalizer = replace(args, normalizer=softmax)
        return softmax_only_reason(any_normalizer, dropout=True) or self.unsupported_layout_reason(args)

    def unsupported_layout_reason(self, args: AttentionArgs) -> str | None:
        """Return why the backend does not support the sharded shapes, or None."""
        del args
        return None

    def block_sizes(self, args: AttentionArgs) -> tuple[int, int] | None:
        """Return the sizes of blocks that divide the parts of the sequence; see `Backend`."""
        if self.local_kernel(args)[0] != Blockwise.name:
            return None
        parts = self.part_lengths(args)
        sizes = default_block_sizes(*parts, args.mask)
        return sizes if all(n % size == 0 for n, size in zip(parts, sizes, strict=True)) else None

    def part_lengths(self, args: AttentionArgs) -> tuple[int, int]:
        """Return the numbers of queries and keys that a block mask must divide into blocks."""
        return args.query.shape[1], args.key.shape[1]

    def local_kernel(self, args: AttentionArgs) -> tuple[str, dict[str, str]]:
        """Return the backend that computes the parts of one device, and why others do not.

        See `Backend`.
        """
        raise NotImplementedError

    def run(self, args: AttentionArgs, offset) -> AttentionResult:
        """See `Backend.run`."""
        raise NotImplementedError


class AllGather(ContextParallelBackend):
    """All-gather of keys and values to every device (Llama 3, arXiv 2407.21783, section 3.3.2).

    Each device then computes its queries with `blockwise`, or with `reference` if the normalizer is
    not softmax.
    """

    name = "all_gather"

    def local_kernel(self, args):
        """See `ContextParallelBackend.local_kernel`."""
        return _plain_backend(args).name, {}

    def run(self, args, offset):
        """See `Backend.run`."""
        axes = args.sequence_axes
        key, value = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (args.key, args.value))
        start = offset[2] + jax.lax.axis_index(axes) * args.query.shape[1]
        local = replace(args, key=key, value=value, sequence_axes=(), sequence_shards=1)
        return _plain_backend(args).run(local, (*offset[:2], start, offset[3]))


def _plain_backend(args: AttentionArgs) -> Backend:
    """Return the backend for a part of the queries, which need not start at query 0."""
    return Blockwise() if args.normalizer is softmax else Reference()


class AllToAll(ContextParallelBackend):
    """All-to-all from shards of the length to shards of the heads, and back.

    Each device then computes the whole length of its heads with the first backend that supports it
    (DeepSpeed Ulysses, arXiv 2309.14509, section 3).
    """

    name = "all_to_all"

    def unsupported_layout_reason(self, args):
        """See `ContextParallelBackend.unsupported_layout_reason`."""
        heads, count = args.key.shape[2], args.sequence_shards
        if heads % count:
            return f"{heads} key heads per device are not divisible by {count} devices"
        if args.score is not None and any(part.mixes_heads for part in args.score.walk()):
            return "its score mixes heads, which it would shard"
        return None

    def local_kernel(self, args):
        """See `ContextParallelBackend.local_kernel`."""

        def shape(x):
            b, t, h, d = x.shape
            return jax.ShapeDtypeStruct((b, t * args.sequence_shards, h // args.sequence_shards, d), x.dtype)

        query, key, value = map(shape, (args.query, args.key, args.value))
        local = replace(args, query=query, key=key, value=value, sequence_axes=(), sequence_shards=1)
        return select_backend("auto", local).name, {}

    def run(self, args, offset):
        """See `Backend.run`."""
        axes = args.sequence_axes
        swap = partial(jax.lax.all_to_all, axis_name=axes, tiled=True)
        query, key, value = (swap(x, split_axis=2, concat_axis=1) for x in (args.query, args.key, args.value))
        heads = query.shape[2]
        start = jax.lax.axis_index(axes) * heads
        local = replace(
            args,
            query=query,
            key=key,
            value=value,
            mask=_swap_to_heads(args.mask, args),
            score=_swap_to_heads(args.score, args),
            dropout=_swap_to_heads(args.dropout, args),
            sinks=None if args.sinks is None else jax.lax.dynamic_slice_in_dim(args.sinks, start, heads),
            block_mask=_of_heads(args.block_mask, axes),
            sequence_axes=(),
            sequence_shards=1,
        )
        backend = select_backend("auto", local)
        with jax.named_scope(kernel_scope(backend.name)):
            out, lse, _ = backend.run(local, (offset[0], offset[1] + start, *offset[2:]))
        return AttentionResult(*(swap(x, split_axis=1, concat_axis=2) for x in (out, lse)))


def _swap_to_heads(value: Pairwise, args: AttentionArgs) -> Pairwise:
    """Return a mask, score or dropout for all queries and this device's heads."""
    axes, queries = args.sequence_axes, args.query.shape[1]
    count = args.sequence_shards

    def change(x, dims):
        # A shard of one query looks like a dimension of 1: gather both.
        axis = {
            name: i for i, name in enumerate(dims) if x.shape[i] > 1 or (name == "queries" and queries == 1)
        }
        if "queries" in axis and "heads" in axis:
            return jax.lax.all_to_all(x, axes, axis["heads"], axis["queries"], tiled=True)
        if "queries" in axis:
            return jax.lax.all_gather(x, axes, axis=axis["queries"], tiled=True)
        if "heads" in axis:
            heads = x.shape[axis["heads"]] // count
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * heads, heads, axis["heads"])
        return x

    return value if value is None else value.map_arrays(change)


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
