"""Splash attention, JAX's block-sparse Pallas kernel for TPUs, as a backend.

The kernel skips the empty blocks of a mask. Segments and lengths are passed as segment ids. If the
other parts of the mask are static, the kernel stores the partial blocks. Otherwise it stores all
pairs in 32 bits, twice for gradients; `max_bytes` limits this. The kernel makes its own lists of
blocks, for all batch rows, and takes none of a `BlockMask`. `splash_kernel` contains the kernel and
imports Pallas.
"""

from dataclasses import replace

import jax.numpy as jnp

from attnlab.attention.backends.registry import AttentionResult, apply_sinks, with_zeroed
from attnlab.attention.backends.splash_blocks import max_block_size
from attnlab.attention.backends.tpu_layout import (
    kernel_block_sizes,
    pad_scores,
    round_up,
    to_bhtd,
    tpu_unsupported_reason,
)
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import NormalForm, is_shared_by_rows, normal_form
from attnlab.attention.masks.dense import GIB, format_bytes, mask_size, materialize_mask
from attnlab.attention.scores import SoftcapScore


class Splash:
    """Any mask, a softcap and sinks, on TPUs. Memory is linear in the length if the mask is static.

    Attributes:
      max_block_size: maximum of block_q and block_kv. None uses the table in `splash_blocks`.
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
        _, mask = _split_ids(args.mask)
        if mask is None or is_shared_by_rows(mask, by_heads=args.is_sharded):
            return None
        size = 4 * mask_size(mask, args.score_shape)
        if size > self.max_bytes:
            return (
                f"the mask apart from segments and lengths is traced or differs between batch rows; stored "
                f"densely it would take {format_bytes(size)}, more than {format_bytes(self.max_bytes)}"
            )
        return None

    def run(self, args, offset):
        """See `Backend.run`."""
        from attnlab.attention.backends import splash_kernel  # deferred: imports Pallas

        lengths = args.query.shape[1], args.key.shape[1]
        in_ids, mask = _split_ids(args.mask)
        is_dense = not (mask is None or is_shared_by_rows(mask, by_heads=args.is_sharded))
        has_ids = in_ids.segments is not None or in_ids.lengths is not None
        max_size = self.max_block_size or max_block_size(args, masked=has_ids or is_dense)
        block_sizes = kernel_block_sizes(args, max_size)
        padded = round_up(lengths, block_sizes)
        options = {"softcap": None if args.score is None else args.score.cap, "interpret": self.interpret}
        allowed_pairs = None
        if not is_dense:
            kernel = splash_kernel.static_kernel(mask, args.query.shape[2], lengths, block_sizes, **options)
        else:
            kernel = splash_kernel.dynamic_kernel(block_sizes, **options)
            allowed_pairs = materialize_mask(mask, args.score_shape, offset)
            args = with_zeroed(args, allowed_pairs)
            allowed_pairs = pad_scores(allowed_pairs, padded, False)
            allowed_pairs = (
                allowed_pairs if len(allowed_pairs) > 1 else allowed_pairs[0]
            )  # shared by all rows
        if kernel is None:
            rows = args.query.shape[:3]
            out, lse = jnp.zeros((*rows, args.value.shape[-1]), args.value.dtype), jnp.full(rows, -jnp.inf)
        else:
            query, key, value = to_bhtd(with_zeroed(args), padded)
            ids = splash_kernel.segment_ids(in_ids, len(query), lengths, padded)
            out, lse = splash_kernel.attention(kernel, query, key, value, ids, allowed_pairs)
            out, lse = (jnp.swapaxes(x, 1, 2)[:, : lengths[0]] for x in (out, lse))
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


def _is_softcap(score) -> bool:
    return isinstance(score, SoftcapScore) and isinstance(score.cap, int | float)


def _split_ids(mask: Mask | None) -> tuple[NormalForm, Mask | None]:
    """Return the parts of a mask that segment ids express, and the mask of the kernel.

    Lengths that are static and equal for all rows are left to the kernel, which then skips blocks.
    """
    form = normal_form(mask)
    lengths = form.lengths
    if lengths is not None and is_shared_by_rows(lengths):
        return NormalForm(segments=form.segments), replace(form, segments=None).as_mask()
    ids = NormalForm(segments=form.segments, lengths=lengths)
    return ids, replace(form, segments=None, lengths=None).as_mask()
