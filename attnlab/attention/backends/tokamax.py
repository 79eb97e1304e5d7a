"""Tokamax's attention for NVIDIA's GPUs, a library that may be installed beside this one, as a backend.

Of its kernels it is the Triton one, which takes scores that add, with their gradient, and any mask; a softcap
it has without a gradient. It holds mask and bias whole: how much of that is still sensible is a limit.
"""

import importlib.util
import math

import jax
import jax.numpy as jnp

from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import CausalMask
from attnlab.attention.masks.dense import (
    GIB,
    format_bytes,
    mask_size,
    materialize_bias,
    materialize_mask,
)


class Tokamax:
    """Scores that only add, with gradients to what they add, and any mask; in half precision.

    Attributes:
      implementation: what it computes with; "xla" is for any platform.
      max_bytes: the most bytes of the mask, and of the bias that a score is made to.
    """

    name = "tokamax"

    def __init__(self, implementation: str = "triton", max_bytes: int = GIB):
        self.implementation, self.max_bytes = implementation, max_bytes

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if args.platform != "gpu" and self.implementation != "xla":
            return f"it is for GPUs, and this is for a {args.platform.upper()}"
        if importlib.util.find_spec("tokamax") is None:
            return "tokamax is not installed"
        if reason := sharded_length_reason(args) or softmax_only_reason(args):
            return reason
        if args.return_lse or args.sinks is not None:
            return "it has no log-sum-exp, which return_lse asks for and sinks need"
        if args.score is not None and not args.score.is_additive:
            return "of scores it takes those that only add, as bias and alibi do"
        if not isinstance(args.scale, int | float):
            return "its scale has to be a number"
        dtypes = {x.dtype.name for x in (args.query, args.key, args.value)}
        if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
            return f"it takes bfloat16 or float16, the same for all three, not {', '.join(sorted(dtypes))}"
        if (size := _num_bytes(args)) > self.max_bytes:
            return f"its mask and bias would take {format_bytes(size)} as a whole"
        return None if self.implementation == "xla" else _unsupported_device_reason()

    def run(self, args, offset):
        """See `Backend.run`."""
        import tokamax  # deferred: takes seconds

        bias = None if args.score is None else materialize_bias(args.score, args.score_shape, offset)
        allowed_pairs = has_keys = None
        if not (args.mask is None or _is_causal(args.mask)):
            allowed_pairs = materialize_mask(args.mask, args.score_shape, offset)
            has_keys = allowed_pairs.any(3, keepdims=True)
            # Without keys a row would get the mean of all values, so it gets some, and is left out after.
            allowed_pairs |= ~has_keys
        out = tokamax.dot_product_attention(
            *(args.query, args.key, args.value, bias, allowed_pairs),
            scale=args.scale,
            is_causal=_is_causal(args.mask),
            implementation=self.implementation,
        )
        if has_keys is not None:
            out = jnp.where(jnp.swapaxes(has_keys, 1, 2), out, 0)
        lse = jnp.full(out.shape[:3], jnp.nan)  # calls that use it are unsupported
        return AttentionResult(out.astype(args.value.dtype), lse)


def _unsupported_device_reason() -> str | None:
    import tokamax

    device = jax.local_devices()[0]
    if tokamax.config.cross_compile.value:
        return None
    if device.platform != "gpu" or float(device.compute_capability) < 8:
        return (
            "its kernel is for GPUs from Ampere on, of which there is none; see tokamax.config.cross_compile"
        )
    return None


def _num_bytes(args: AttentionArgs) -> int:
    """Bytes of the mask and the bias."""
    size = 0 if args.score is None else 4 * math.prod(args.score_shape)
    if args.mask is None or _is_causal(args.mask):
        return size
    return size + mask_size(args.mask, args.score_shape)


def _is_causal(mask: Mask | None) -> bool:
    """Whether it is `causal()`, of which the kernel skips the empty blocks."""
    return isinstance(mask, CausalMask) and isinstance(mask.offset, int) and mask.offset == 0
