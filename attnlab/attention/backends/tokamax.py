"""Attention of the optional dependency Tokamax, for NVIDIA GPUs, as a backend.

The backend uses Tokamax's Triton kernel, which supports additive scores with gradients and any
mask. Its softcap has no gradient and is not used. Mask and bias are dense; `max_bytes` limits their
size.
"""

import importlib.util
import math

import jax
import jax.numpy as jnp

from attnlab.attention.arrays import named_output
from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    kernel_mesh_reason,
    sharded_length_reason,
    softmax_only_reason,
    with_zeroed,
)
from attnlab.attention.masks.basic import normal_form
from attnlab.attention.masks.dense import (
    GIB,
    format_bytes,
    mask_size,
    materialize_bias,
    materialize_mask,
)


class Tokamax:
    """Additive scores with gradients, and any mask, in half precision.

    Attributes:
      implementation: implementation argument of Tokamax. "xla" runs on any platform.
      max_bytes: maximum size in bytes of the dense mask and bias together.
    """

    name = "tokamax"

    def __init__(self, implementation: str = "triton", max_bytes: int = GIB):
        self.implementation, self.max_bytes = implementation, max_bytes

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if args.platform != "gpu" and self.implementation != "xla":
            return f"it requires a GPU, not a {args.platform.upper()}"
        if importlib.util.find_spec("tokamax") is None:
            return "tokamax is not installed"
        if reason := sharded_length_reason(args) or softmax_only_reason(args) or kernel_mesh_reason(args):
            return reason
        if args.return_lse or args.sinks is not None:
            return "it returns no log-sum-exp, which return_lse and sinks need"
        if args.score is not None and not args.score.is_additive:
            return "it supports only additive scores, such as bias and alibi"
        if not isinstance(args.scale, int | float):
            return "scale must be a Python number"
        dtypes = {x.dtype.name for x in (args.query, args.key, args.value)}
        if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
            return (
                f"query, key and value must all be bfloat16 or all float16, not {', '.join(sorted(dtypes))}"
            )
        if (size := _num_bytes(args)) > self.max_bytes:
            limit = format_bytes(self.max_bytes)
            return f"its dense mask and bias would take {format_bytes(size)}; the limit is {limit}"
        return None if self.implementation == "xla" else _unsupported_device_reason()

    def run(self, args, offset):
        """See `Backend.run`."""
        import tokamax  # deferred: the import takes seconds

        bias = None if args.score is None else materialize_bias(args.score, args.score_shape, offset)
        allowed_pairs = has_keys = None
        args = with_zeroed(args)
        if not _needs_no_dense_mask(args):
            allowed_pairs = materialize_mask(args.mask, args.score_shape, offset)
            args = with_zeroed(args, allowed_pairs)
            has_keys = allowed_pairs.any(3, keepdims=True)
            # Without keys, Tokamax returns the mean of all values. Such rows get all keys here, and
            # their output is set to 0 below.
            allowed_pairs |= ~has_keys
        out = tokamax.dot_product_attention(
            *(args.query, args.key, args.value, bias, allowed_pairs),
            scale=args.scale,
            is_causal=has_keys is None and normal_form(args.mask).right == 0,
            implementation=self.implementation,
        )
        (out,) = named_output(out)
        if has_keys is not None:
            out = jnp.where(jnp.swapaxes(has_keys, 1, 2), out, 0)
        lse = jnp.full(out.shape[:3], jnp.nan)  # `unsupported_reason` rejects calls that use it
        return AttentionResult(out.astype(args.value.dtype), lse)


def _unsupported_device_reason() -> str | None:
    import tokamax

    device = jax.local_devices()[0]
    if tokamax.config.cross_compile.value:
        return None
    if device.platform != "gpu" or float(device.compute_capability) < 8:
        return (
            "its kernel requires a GPU of compute capability 8.0 (Ampere) or later; to compile without "
            "one, set tokamax.config.cross_compile"
        )
    return None


def _num_bytes(args: AttentionArgs) -> int:
    """Return the size in bytes of the dense mask and bias."""
    size = 0 if args.score is None else 4 * math.prod(args.score_shape)
    if args.mask is None or _needs_no_dense_mask(args):
        return size
    return size + mask_size(args.mask, args.score_shape)


def _needs_no_dense_mask(args: AttentionArgs) -> bool:
    """Return whether the mask is none or `causal()`, whose empty blocks the kernel skips."""
    form = normal_form(args.mask)
    return form.is_relative and form.static_bounds in ((None, None), (None, 0))
