"""The oracle: the full score matrix in float32 (float64 stays float64), and the weights themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.masks import Mask
from attnlab.attention.scores import Score


def reference(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"], Float[Array, "B H T S"]]:
    """softmax(score(scale * Q K^T)) V with every pair written out (Vaswani et al. 2017, equation 1).

    Returns:
      The output in the value's dtype, the log-sum-exp of the scores, and the weights. A query with
      no key to attend to gets output 0, weights 0 and log-sum-exp -inf.
    """
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(b, t, k, h // k, d).astype(dtype)
    scores = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key.astype(dtype))
    if score is not None:
        scores = score(scores)
    if mask is not None:
        scores = jnp.where(group_heads(mask.materialize(t, s), k), scores, -jnp.inf)
    weights, lse = softmax(scores)
    dropped = _dropout(weights, dropout_rate, dropout_key)
    out = jnp.einsum("bkgts,bskd->btkgd", dropped, value.astype(dtype))
    return (
        out.reshape(b, t, h, -1).astype(value.dtype),
        jnp.moveaxis(lse.reshape(b, h, t), 1, 2),
        weights.reshape(b, h, t, s),
    )


def softmax(scores: Float[Array, "*b S"]) -> tuple[Float[Array, "*b S"], Float[Array, "*b"]]:
    """Weights and log-sum-exp over the last axis; a row of -inf gives weights 0 and -inf, with gradient 0."""
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    exponentials = jnp.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return exponentials / total, lse[..., 0]


def group_heads(allowed: Bool[Array, "B H T S"], num_kv_heads: int) -> Bool[Array, "B K G T S"]:
    """A mask block with its head dimension split as grouped scores are; a single head stays single."""
    b, h, t, s = allowed.shape
    if h == 1:
        return allowed[:, :, None]
    return allowed.reshape(b, num_kv_heads, h // num_kv_heads, t, s)


def _dropout(weights: Array, rate: float, key: Array | None) -> Array:
    if rate == 0.0 or key is None:
        return weights
    keep = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(keep, weights / (1.0 - rate), 0.0)
