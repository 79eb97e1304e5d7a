"""Attention of a single query per row, for decoding one token at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import unify_varying, wide
from attnlab.attention.backends.reference import attention_weights
from attnlab.attention.backends.registry import AttentionResult, sharded_length_reason, softmax_only_reason
from attnlab.attention.masks.base import Mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import BlockOffset, block_indices
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
    at = block_indices(offset, (b, h, 1, key.shape[1]))
    allowed = None if mask is None else mask.evaluate(at)
    dtype = wide(query)
    keys, values = (_squeeze_single_row(x.astype(dtype)) for x in (key, value))  # ([B], S, K, D)
    if allowed is not None:
        query = jnp.where(allowed.any(3)[..., None].reshape(-1, 1, allowed.shape[1], 1), query, 0)
    grouped = jnp.moveaxis(query.reshape(b, 1, k, h // k, d).astype(dtype), 3, 0)  # (G, B, 1, K, D)
    used = _used_keys(allowed, k)
    products = jnp.stack(
        [_products(*unify_varying((_squeeze_single_row(q), keys, used))) for q in grouped]
    )  # (G, [B], S, K)
    # Without the barrier, XLA would recompute the products for every element of the output.
    products = jax.lax.optimization_barrier(products)
    scores = scale * jnp.moveaxis(products.reshape(h // k, b, -1, k), (0, 2), (2, 3))  # (B, K, G, S)
    scores = scores.reshape(b, h, 1, -1)
    if allowed is not None:
        scores = jnp.where(allowed, scores, 0)
    weights, lse = attention_weights(scores, at, allowed, score, sinks, softmax)
    weights = jnp.moveaxis(weights.reshape(b, k, h // k, -1), (2, 3), (0, 2))[..., None]  # (G, B, S, K, 1)
    out = jnp.stack([_weighted_sum(_squeeze_single_row(w), values) for w in weights], axis=-2)
    return out.reshape(b, 1, h, -1).astype(value.dtype), jnp.moveaxis(lse, 1, 2)


def _used_keys(allowed: Array | None, kv_heads: int) -> Array | None:
    """Return which keys the query of any head of their group attends to, ([B], S, K or 1, 1)."""
    if allowed is None:
        return None
    b, h, _, s = allowed.shape
    grouped = allowed.reshape(b, min(h, kv_heads), -1, s).any(2)
    return _squeeze_single_row(jnp.swapaxes(grouped, 1, 2)[..., None])


@jax.custom_jvp
def _products(query: Array, keys: Array, used: Array | None) -> Array:
    """Return the product of the query and each key, ([B], S, K)."""
    return (query * keys).sum(-1)


@_products.defjvp
def _products_jvp(primals, tangents):
    # Only derivatives need keys without NaN: `where` on all keys would cost a third of the time.
    (query, keys, used), (d_query, d_keys, _) = primals, tangents
    clean = keys if used is None else jnp.where(used, keys, 0)
    return _products(*primals), (d_query * clean).sum(-1) + (query * d_keys).sum(-1)


def _weighted_sum(weights: Array, values: Array) -> Array:
    """Return the sum of the values, without those of weight 0, which may be NaN."""
    return (weights * jnp.where(weights == 0, 0, values)).sum(-3)


def _squeeze_single_row(x: Array) -> Array:
    """Remove a batch dimension of 1, with which XLA's CPU backend sums 10 times more slowly."""
    return x.reshape(x.shape[1:]) if len(x) == 1 else x


class Decode:
    """Any mask and score, for one query per row, on CPUs; see `decode`."""

    name = "decode"

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if args.platform != "cpu":
            return (
                f"its sums replace matrix products that are slow on a CPU, not on a {args.platform.upper()}"
            )
        count = args.query.shape[1]
        count_reason = None if count == 1 else f"it supports one query per row, not {count}"
        return count_reason or softmax_only_reason(args) or sharded_length_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        options = {"mask": args.mask, "score": args.score, "scale": args.scale, "sinks": args.sinks}
        return AttentionResult(*decode(args.query, args.key, args.value, **options, offset=offset))
