"""cuDNN's fused attention for NVIDIA's GPUs, through `jax.nn.dot_product_attention`, as a backend.

It is asked only for what it gives exactly as the other backends do: it rounds a bias to the width of the
query, takes another mask as such a bias, and returns a log-sum-exp that is rounded and has no gradient.
"""

import jax
import jax.numpy as jnp

from attnlab.attention.backends import Request, Result, beyond_softmax, sharded_length
from attnlab.attention.masks import And, Mask
from attnlab.attention.patterns import Causal, Window


class Cudnn:
    """No mask, or a causal one with or without a window, in half precision."""

    name = "cudnn"

    def refuse(self, request):
        """See `Backend.refuse`."""
        r = request
        if r.platform != "gpu":
            return f"it is for GPUs, and this is for a {r.platform.upper()}"
        if reason := sharded_length(r) or beyond_softmax(r):
            return reason
        if r.wants_lse or r.sinks is not None:
            return "its log-sum-exp, which return_lse asks for and sinks need, is rounded and has no gradient"
        if r.score is not None:
            return "it changes no scores"
        if not isinstance(r.scale, int | float):
            return "its scale has to be a number"
        return _refuse_shapes(r) or _refuse_mask(r)

    def run(self, request, first):
        """See `Backend.run`."""
        del first  # its masks know distances alone
        r = request
        left, right = _reach(r.mask)
        out = jax.nn.dot_product_attention(
            *(r.query, r.key, r.value),
            scale=r.scale,
            is_causal=right is not None,
            local_window_size=None if left is None else (left, 0),
            implementation="cudnn",
        )
        return Result(out, jnp.full(out.shape[:3], jnp.nan))  # which nobody asked for


def _refuse_shapes(r: Request) -> str | None:
    dtypes = {x.dtype.name for x in (r.query, r.key, r.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"it takes bfloat16 or float16, the same for all three, not {', '.join(sorted(dtypes))}"
    width, value_width = r.query.shape[-1], r.value.shape[-1]
    if width != value_width or width % 8 or width > 128:
        return (
            f"it takes one head_dim, a multiple of 8 of at most 128, for query, key and value, not "
            f"{width} and {value_width}"
        )
    return None


def _refuse_mask(r: Request) -> str | None:
    reach = _reach(r.mask)
    if reach == (None, None):
        return None
    if reach is None or reach[1] != 0 or (reach[0] or 0) < 0:
        return "of masks it has causal() alone, and window(left, 0)"
    if r.query.shape[1] > r.key.shape[1]:
        return "its causal mask is for no more queries than keys"
    return None


def _reach(mask: Mask | None) -> tuple[int | None, int | None] | None:
    """How far before and after a query its keys may lie, where that, being known, is all of the mask.

    None is no limit, as in `Window`.
    """
    match mask:
        case None:
            return None, None
        case Causal(offset=int(offset)):
            return None, offset
        case Window(left=left, right=right, offset=int(offset)):
            return None if left is None else left - offset, None if right is None else right + offset
        case And():
            one, other = _reach(mask.left), _reach(mask.right)
            return one and other and (_least(one[0], other[0]), _least(one[1], other[1]))
    return None


def _least(*limits: int | None) -> int | None:
    return min((x for x in limits if x is not None), default=None)
