"""Random attention inputs, Hypothesis strategies for masks, and a scalar loss of all outputs."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from attnlab.attention import causal, segments, window
from attnlab.attention.masks.base import Mask


def qkv(seed, b=2, t=5, s=7, h=4, k=2, d=6, dv=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((b, t, h, d), (b, s, k, d), (b, s, k, dv))
    return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)


# A fixed list, because JAX compiles every operation once per shape.
SHAPES = (
    {"b": 2, "t": 5, "s": 9, "h": 6, "k": 2, "d": 3, "dv": 4},
    {"b": 1, "t": 1, "s": 7, "h": 3, "k": 1, "d": 5, "dv": 2},
    {"b": 2, "t": 11, "s": 6, "h": 2, "k": 2, "d": 4, "dv": 1},
)


@st.composite
def masks(draw, b, t, s, depth=2) -> Mask:
    if depth and draw(st.booleans()):
        left = draw(masks(b, t, s, depth - 1))
        match draw(st.sampled_from("&|~")):
            case "~":
                return ~left
            case "&":
                return left & draw(masks(b, t, s, depth - 1))
            case _:
                return left | draw(masks(b, t, s, depth - 1))
    match draw(st.sampled_from(("causal", "window", "segments"))):
        case "causal":
            return causal(draw(st.integers(-t, s)))
        case "window":
            width = st.none() | st.integers(0, s)
            return window(draw(width), draw(width), draw(st.integers(-t, s)))
        case _:
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            return segments(jnp.asarray(rng.integers(0, 3, (b, t))), jnp.asarray(rng.integers(0, 3, (b, s))))


def allowed_pairs(mask, b, t, s):
    """Return a mask as (b, t, s) booleans, evaluated pair by pair without `Mask.evaluate`."""

    def allows(m, row, i, j):
        match type(m).__name__:
            case "AndMask":
                return allows(m.left, row, i, j) and allows(m.right, row, i, j)
            case "OrMask":
                return allows(m.left, row, i, j) or allows(m.right, row, i, j)
            case "NotMask":
                return not allows(m.mask, row, i, j)
            case "CausalMask":
                return j <= i + m.offset
            case "WindowMask":
                at = i + m.offset
                return (m.left is None or j >= at - m.left) and (m.right is None or j <= at + m.right)
            case "SegmentMask":
                return m.keys[row, j] > 0 and m.queries[row, i] == m.keys[row, j]
        raise AssertionError(m)

    mask = jax.tree.map(np.asarray, mask)
    return np.array([[[allows(mask, r, i, j) for j in range(s)] for i in range(t)] for r in range(b)])


def weighted_sum(out, lse):
    """Return a scalar that weights every output and every finite log-sum-exp differently."""
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    a = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    b = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    return jnp.sum(a * out.astype(jnp.float32)) + jnp.sum(b * finite)
