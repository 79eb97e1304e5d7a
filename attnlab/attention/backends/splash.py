"""Splash attention, JAX's block-sparse Pallas kernel for TPUs, as a backend.

The kernel skips the empty blocks of a mask. If the mask apart from its segments is static, the
kernel stores the partial blocks. Otherwise it stores all pairs in 32 bits, twice for gradients;
`max_bytes` limits this. `splash_kernel` contains the kernel and imports Pallas.
"""

import jax.numpy as jnp

from attnlab.attention.backends.registry import AttentionArgs, AttentionResult, apply_sinks
from attnlab.attention.backends.tpu_layout import (
    kernel_block_sizes,
    pad_scores,
    round_up,
    to_bhtd,
    tpu_unsupported_reason,
)
from attnlab.attention.block_mask import is_static
from attnlab.attention.masks.base import AndMask, Mask, depends_on_batch_and_heads
from attnlab.attention.masks.basic import SegmentMask
from attnlab.attention.masks.dense import GIB, format_bytes, mask_size, materialize_mask
from attnlab.attention.scores import SoftcapScore


class Splash:
    """Any mask, a softcap and sinks, on TPUs. Memory is linear in the length if the mask is static.

    Attributes:
      max_block_size: maximum of block_q and block_kv. None uses 1024, or 512 for float32 or heads
        wider than 128, which fits the kernel's VMEM.
      interpret: whether to run the kernel in Pallas interpret mode, on any platform.
      max_bytes: maximum size in bytes of a mask that is stored densely.
    """

    name = "splash"

    def __init__(self, max_block_size: int | None = None, interpret: bool = False, max_bytes: int = GIB):
        self.max_block_size, self.interpret, self.max_bytes = max_block_size, interpret, max_bytes

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if reason := tpu_unsupported_reason(args, self.interpret):
            return reason
        if args.score is not None and not _is_softcap(args.score):
            return "the only score it supports is softcap(number)"
        _, mask = _split_segments(args.mask)
        if mask is None or _is_static_for_kernel(mask, args):
            return None
        size = 4 * mask_size(mask, args.score_shape)
        if size > self.max_bytes:
            return (
                f"the mask apart from its segments is traced or differs between batch rows; stored densely "
                f"it would take {format_bytes(size)}, more than {format_bytes(self.max_bytes)}"
            )
        return None

    def run(self, args, offset):
        """See `Backend.run`."""
        from attnlab.attention.backends import splash_kernel  # deferred: imports Pallas

        lengths = args.query.shape[1], args.key.shape[1]
        wide = max(args.query.shape[-1], args.value.shape[-1]) > 128 or args.query.dtype == jnp.float32
        block_sizes = kernel_block_sizes(args, self.max_block_size or (512 if wide else 1024))
        padded = round_up(lengths, block_sizes)
        segments, mask = _split_segments(args.mask)
        options = {"softcap": args.score.cap if args.score else None, "interpret": self.interpret}
        allowed_pairs = None
        if mask is None or _is_static_for_kernel(mask, args):
            kernel = splash_kernel.static_kernel(mask, args.query.shape[2], lengths, block_sizes, **options)
        else:
            kernel = splash_kernel.dynamic_kernel(block_sizes, **options)
            allowed_pairs = materialize_mask(mask, args.score_shape, offset)
            allowed_pairs = pad_scores(allowed_pairs, padded, False)
            allowed_pairs = (
                allowed_pairs if len(allowed_pairs) > 1 else allowed_pairs[0]
            )  # shared by all rows
        if kernel is None:
            rows = args.query.shape[:3]
            out, lse = jnp.zeros((*rows, args.value.shape[-1]), args.value.dtype), jnp.full(rows, -jnp.inf)
        else:
            query, key, value = to_bhtd(args, padded)
            ids = segments and splash_kernel.segment_ids(segments.queries, segments.keys, len(query), padded)
            out, lse = splash_kernel.attention(kernel, query, key, value, ids, allowed_pairs)
            out, lse = (jnp.swapaxes(x, 1, 2)[:, : lengths[0]] for x in (out, lse))
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


def _is_softcap(score) -> bool:
    return isinstance(score, SoftcapScore) and isinstance(score.cap, int | float)


def _split_segments(mask: Mask | None) -> tuple[SegmentMask | None, Mask | None]:
    """Return the first `SegmentMask` operand of a conjunction, and the other operands."""
    if isinstance(mask, SegmentMask):
        return mask, None
    if isinstance(mask, AndMask):
        for operand, other in ((mask.left, mask.right), (mask.right, mask.left)):
            segments, rest = _split_segments(operand)
            if segments is not None:
                return segments, other if rest is None else rest & other
    return None, mask


def _is_static_for_kernel(mask: Mask, args: AttentionArgs) -> bool:
    """Return whether the mask is the same for all batch rows and can be built at trace time."""
    if not is_static(mask):
        return False
    rows, heads = depends_on_batch_and_heads(mask)
    return not rows and not (heads and args.is_sharded)  # a shard's head offset is traced
