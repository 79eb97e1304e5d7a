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

from attnlab.attention.arrays import named_output
from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    sharded_length_reason,
    softmax_only_reason,
    with_zeroed,
)
from attnlab.attention.masks.basic import NormalForm, normal_form

SUPPORTED_MASKS = "it supports only the masks causal(), window(left, 0) and key_lengths()"


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
        args = with_zeroed(args)
        form = normal_form(args.mask)
        lengths, has_keys = _sequence_lengths(form, args)
        out = jax.nn.dot_product_attention(
            *(args.query, args.key, args.value),
            scale=args.scale,
            is_causal=form.right is not None,
            local_window_size=None if form.left is None else (form.left, 0),
            **lengths,
            implementation="cudnn",
        )
        (out,) = named_output(out)
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
    form = normal_form(args.mask)
    if form.segments is not None or form.intervals or form.rest is not None or form.static_bounds is None:
        return SUPPORTED_MASKS
    left, right = form.static_bounds
    if (left, right) == (None, None):
        return None
    if right != 0 or (left or 0) < 0:
        return SUPPORTED_MASKS
    if args.query.shape[1] > args.key.shape[1]:
        return "its causal mask supports no more queries than keys"
    return None


def _sequence_lengths(form: NormalForm, args: AttentionArgs) -> tuple[dict[str, Array], Array | None]:
    """Return cuDNN's length arguments, (B,) each, and which queries have a key, (B, T, 1, 1)."""
    if form.lengths is None:
        return {}, None
    rows, t, s = *args.query.shape[:2], args.key.shape[1]

    def lengths(limit, *numbers):
        for number in numbers:
            limit = jnp.minimum(limit, jnp.asarray(number, jnp.int32))
        return jnp.broadcast_to(limit, (rows,))

    keys = lengths(s, form.lengths.keys)
    # All keys in the window of a query from `keys + left` on are padding.
    queries = lengths(t, *[] if form.left is None else [keys + form.left])
    if form.lengths.queries is not None:
        queries = lengths(queries, form.lengths.queries)
    # Lengths are at least 1, since the kernel's results and gradients are undefined without keys.
    options = {
        "query_seq_lengths": jnp.maximum(queries, 1),
        "key_value_seq_lengths": jnp.maximum(keys, 1),
    }
    has_keys = (jnp.arange(t)[None] < queries[:, None]) & (keys[:, None] > 0)
    return options, has_keys[:, :, None, None]
