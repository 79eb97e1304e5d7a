"""cuDNN's fused attention for NVIDIA's GPUs, through `jax.nn.dot_product_attention`, as a backend.

It is asked only for what it gives exactly as the other backends do: it rounds a bias to the width of the
query, takes another mask as such a bias, and returns a log-sum-exp that is rounded and has no gradient.
It has packed rows only as runs, one after the other, that it is told the beginnings of, which `segments`
does not promise: its ids are mostly known only when run, and may come in any order. Its `score_mod`, which
JAX keeps private, has no gradient to arrays, and an operation that cuDNN lacks, such as the `1 - x` of the
derivative of a softcap, is not refused when compiled: it ends the process on the GPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.masks.base import AndMask, Mask
from attnlab.attention.masks.basic import CausalMask, WindowMask
from attnlab.attention.masks.intervals import KeyLengthMask


class Cudnn:
    """No mask, or a causal one with or without a window, or padding, in half precision."""

    name = "cudnn"

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if args.platform != "gpu":
            return f"it is for GPUs, and this is for a {args.platform.upper()}"
        if reason := sharded_length_reason(args) or softmax_only_reason(args):
            return reason
        if args.return_lse or args.sinks is not None:
            return "its log-sum-exp, which return_lse asks for and sinks need, is rounded and has no gradient"
        if args.score is not None:
            return "it changes no scores"
        if not isinstance(args.scale, int | float):
            return "its scale has to be a number"
        return _unsupported_shapes_reason(args) or _unsupported_mask_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        del offset  # its masks know distances and lengths alone
        paddings, others = _split_key_lengths(args.mask)
        left, right = _window_bounds(others)
        lengths, has_keys = _sequence_lengths(paddings, args)
        out = jax.nn.dot_product_attention(
            *(args.query, args.key, args.value),
            scale=args.scale,
            is_causal=right is not None,
            local_window_size=None if left is None else (left, 0),
            **lengths,
            implementation="cudnn",
        )
        if has_keys is not None:
            out = jnp.where(has_keys, out, 0)
        return AttentionResult(out, jnp.full(out.shape[:3], jnp.nan))  # an lse is unsupported


def _unsupported_shapes_reason(args: AttentionArgs) -> str | None:
    dtypes = {x.dtype.name for x in (args.query, args.key, args.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"it takes bfloat16 or float16, the same for all three, not {', '.join(sorted(dtypes))}"
    width, value_width = args.query.shape[-1], args.value.shape[-1]
    if width != value_width or width % 8 or width > 128:
        return (
            f"it takes one head_dim, a multiple of 8 of at most 128, for query, key and value, not "
            f"{width} and {value_width}"
        )
    return None


def _unsupported_mask_reason(args: AttentionArgs) -> str | None:
    paddings, others = _split_key_lengths(args.mask)
    bounds = _window_bounds(others)
    if bounds == (None, None):
        return None
    if bounds is None or bounds[1] != 0 or (bounds[0] or 0) < 0:
        return "of masks it has causal(), window(left, 0) and key_lengths() alone"
    if paddings and bounds[0] is not None:
        return "it has no window beside key_lengths(), as all keys in it may be padding"
    if args.query.shape[1] > args.key.shape[1]:
        return "its causal mask is for no more queries than keys"
    return None


def _split_key_lengths(mask: Mask | None) -> tuple[list[KeyLengthMask], list[Mask]]:
    """The masks of which a pair needs all, those that are padding apart from the others."""
    match mask:
        case None:
            return [], []
        case KeyLengthMask():
            return [mask], []
        case AndMask():
            one, other = _split_key_lengths(mask.left), _split_key_lengths(mask.right)
            return one[0] + other[0], one[1] + other[1]
    return [], [mask]


def _window_bounds(masks: list[Mask]) -> tuple[int | None, int | None] | None:
    """How far before and after a query its keys may lie, where that, being known, is all of the masks.

    None is no limit, as in `WindowMask`.
    """
    lefts, rights = [], []
    for mask in masks:
        match mask:
            case CausalMask(offset=int(offset)):
                rights.append(offset)
            case WindowMask(left=left, right=right, offset=int(offset)):
                lefts += [] if left is None else [left - offset]
                rights += [] if right is None else [right + offset]
            case _:
                return None
    return min(lefts, default=None), min(rights, default=None)


def _sequence_lengths(
    paddings: list[KeyLengthMask], args: AttentionArgs
) -> tuple[dict[str, Array], Array | None]:
    """What cuDNN is told of the lengths of each row, and which queries have a key, (B, T, 1, 1)."""
    if not paddings:
        return {}, None
    rows, t, s = *args.query.shape[:2], args.key.shape[1]

    def minimum(numbers, limit):
        for number in numbers:
            limit = jnp.minimum(limit, jnp.asarray(number, jnp.int32))
        return jnp.broadcast_to(limit, (rows,))

    queries = minimum([p.queries for p in paddings if p.queries is not None], t)
    keys = minimum([p.keys for p in paddings], s)
    # In the kernel no row is without keys: what it would give there, or as a gradient, is not promised.
    options = {
        "query_seq_lengths": jnp.maximum(queries, 1),
        "key_value_seq_lengths": jnp.maximum(keys, 1),
    }
    has_keys = (jnp.arange(t)[None] < queries[:, None]) & (keys[:, None] > 0)
    return options, has_keys[:, :, None, None]
