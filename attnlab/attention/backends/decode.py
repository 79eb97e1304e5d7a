"""Attention of a single query per row, for decoding one token at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends.reference import attention_weights
from attnlab.attention.backends.registry import AttentionResult, sharded_length_reason, softmax_only_reason
from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import block_indices
from attnlab.attention.scores import Score


def decode(
    query: Float[Array, "B 1 H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    sinks: Float[Array, " H"] | None = None,
    offset: BlockOffset = (0, 0, 0, 0),
) -> tuple[Float[Array, "B 1 H Dv"], Float[Array, "B 1 H"]]:
    """Return output and log-sum-exp as `reference` does, by elementwise products and sums.

    Each key and value is read once, without a copy. For matrix products, XLA's CPU backend would
    transpose all keys and values for every query.
    """
    b, _, h, d = query.shape
    k = key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    keys, values = (_squeeze_single_row(x.astype(dtype)) for x in (key, value))  # ([B], S, K, D)
    grouped = jnp.moveaxis(query.reshape(b, 1, k, h // k, d).astype(dtype), 3, 0)  # (G, B, 1, K, D)
    products = jnp.stack([(_squeeze_single_row(q) * keys).sum(-1) for q in grouped])  # (G, [B], S, K)
    # Without the barrier, XLA would recompute the products for every element of the output.
    products = jax.lax.optimization_barrier(products)
    scores = scale * jnp.moveaxis(products.reshape(h // k, b, -1, k), (0, 2), (2, 3))  # (B, K, G, S)
    scores = scores.reshape(b, h, 1, -1)
    weights, lse = attention_weights(scores, block_indices(offset, scores.shape), mask, score, sinks, softmax)
    weights = jnp.moveaxis(weights.reshape(b, k, h // k, -1), (2, 3), (0, 2))[..., None]  # (G, B, S, K, 1)
    out = jnp.stack([(_squeeze_single_row(w) * values).sum(-3) for w in weights], axis=-2)
    return out.reshape(b, 1, h, -1).astype(value.dtype), jnp.moveaxis(lse, 1, 2)


def _squeeze_single_row(x: Array) -> Array:
    """Remove a batch dimension of 1, with which XLA's CPU backend sums 10 times more slowly."""
    return x.reshape(x.shape[1:]) if len(x) == 1 else x


class Decode:
    """Any mask and score, for one query per row; see `decode`."""

    name = "decode"

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        count = args.query.shape[1]
        count_reason = None if count == 1 else f"it supports one query per row, not {count}"
        return count_reason or softmax_only_reason(args) or sharded_length_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        options = {"mask": args.mask, "score": args.score, "scale": args.scale, "sinks": args.sinks}
        return AttentionResult(*decode(args.query, args.key, args.value, **options, offset=offset))
