"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`, as a backend.

The backend supports only calls whose results agree with those of the other backends. It therefore
rejects

- biases, and masks other than causal, window and padding, which JAX passes as biases: cuDNN rounds
  a bias to the dtype of the query;
- the log-sum-exp, which is rounded and has no gradient;
- segments: cuDNN supports packed rows only as contiguous sequences with given offsets, while
  segment ids are usually traced and may be in any order;
- scores: `score_mod`, which JAX keeps private, has no gradient to arrays, and an operation that
  cuDNN lacks, such as `1 - x` in the derivative of a softcap, compiles and then aborts the process
  on the GPU.
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
    """No mask, causal and window masks, and key lengths (padding), in half precision."""

    name = "cudnn"

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if args.platform != "gpu":
            return f"it requires a GPU, not a {args.platform.upper()}"
        if reason := sharded_length_reason(args) or softmax_only_reason(args):
            return reason
        if args.return_lse or args.sinks is not None:
            return "its log-sum-exp, which return_lse and sinks need, is rounded and has no gradient"
        if args.score is not None:
            return "it does not support scores"
        if not isinstance(args.scale, int | float):
            return "scale must be a Python number"
        return _unsupported_shapes_reason(args) or _unsupported_mask_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        del offset  # its masks depend only on distances and lengths
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
        return f"query, key and value must all be bfloat16 or all float16, not {', '.join(sorted(dtypes))}"
    width, value_width = args.query.shape[-1], args.value.shape[-1]
    if width != value_width or width % 8 or width > 128:
        return (
            f"head_dim must be the same for query, key and value, a multiple of 8 and at most 128, not "
            f"{width} and {value_width}"
        )
    return None


def _unsupported_mask_reason(args: AttentionArgs) -> str | None:
    paddings, others = _split_key_lengths(args.mask)
    bounds = _window_bounds(others)
    if bounds == (None, None):
        return None
    if bounds is None or bounds[1] != 0 or (bounds[0] or 0) < 0:
        return "it supports only the masks causal(), window(left, 0) and key_lengths()"
    if paddings and bounds[0] is not None:
        return "it does not support a window with key_lengths(), since all keys of a window may be padding"
    if args.query.shape[1] > args.key.shape[1]:
        return "its causal mask supports no more queries than keys"
    return None


def _split_key_lengths(mask: Mask | None) -> tuple[list[KeyLengthMask], list[Mask]]:
    """Return the operands of a conjunction, split into key lengths (padding) and other masks."""
    match mask:
        case None:
            return [], []
        case KeyLengthMask():
            return [mask], []
        case AndMask():
            left, right = _split_key_lengths(mask.left), _split_key_lengths(mask.right)
            return left[0] + right[0], left[1] + right[1]
    return [], [mask]


def _window_bounds(masks: list[Mask]) -> tuple[int | None, int | None] | None:
    """Return how far keys may be before and after their query, if the masks depend on nothing else.

    A limit of None means no limit, as in `WindowMask`. The result is None if any
    mask is neither causal nor a window, or has a traced offset.
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
    """Return cuDNN's length arguments, (B,) each, and which queries have a key, (B, T, 1, 1)."""
    if not paddings:
        return {}, None
    rows, t, s = *args.query.shape[:2], args.key.shape[1]

    def minimum(numbers, limit):
        for number in numbers:
            limit = jnp.minimum(limit, jnp.asarray(number, jnp.int32))
        return jnp.broadcast_to(limit, (rows,))

    queries = minimum([p.queries for p in paddings if p.queries is not None], t)
    keys = minimum([p.keys for p in paddings], s)
    # Lengths are at least 1, since the kernel's results and gradients are undefined without keys.
    options = {
        "query_seq_lengths": jnp.maximum(queries, 1),
        "key_value_seq_lengths": jnp.maximum(keys, 1),
    }
    has_keys = (jnp.arange(t)[None] < queries[:, None]) & (keys[:, None] > 0)
    return options, has_keys[:, :, None, None]
