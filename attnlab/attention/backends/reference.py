"""Reference attention: all scores in float32 (float64 for float64 inputs), with the weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends.registry import AttentionResult, sharded_length_reason
from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import PairIndices, block_indices
from attnlab.attention.scores import Score

# A modified score that is at most this value masks its pair, in every backend. It is finite, since
# inf - inf would be NaN in backends that keep a running maximum.
MASK_VALUE = -1e30


def reference(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    sinks: Float[Array, " H"] | None = None,
    normalizer: Callable = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    offset: BlockOffset = (0, 0, 0, 0),
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"], Float[Array, "B H T S"]]:
    """Return softmax(score(scale * Q K^T)) V, over all pairs (Vaswani et al. 2017, equation 1).

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: the pairs that may attend. None allows every pair.
      score: modifies the scaled scores.
      scale: factor of the scores.
      sinks: one extra logit per head that takes part in the softmax and has no value, (H,).
      normalizer: maps masked scores to weights and their log-normalizer, over the last axis.
      dropout_rate: fraction of the weights to drop. Without `dropout_key`, no weight is dropped.
      dropout_key: random key of the dropout.
      offset: indices of the first batch row, head, query and key, if the arrays are a shard.

    Returns:
      The output in the dtype of `value`, the log-sum-exp of the scores, and the weights before
      dropout. A query without keys has output 0, weights 0 and log-sum-exp -inf.
    """
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(b, t, k, h // k, d).astype(dtype)
    scores = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key.astype(dtype)).reshape(b, h, t, s)
    weights, lse = attention_weights(
        scores, block_indices(offset, scores.shape), mask, score, sinks, normalizer
    )
    dropped = _dropout(weights, dropout_rate, dropout_key).reshape(b, k, h // k, t, s)
    out = jnp.einsum("bkgts,bskd->btkgd", dropped, value.astype(dtype))
    return out.reshape(b, t, h, -1).astype(value.dtype), jnp.moveaxis(lse, 1, 2), weights


def attention_weights(
    scores: Float[Array, "B H T S"],
    at: PairIndices,
    mask: Mask | None,
    score: Score | None,
    sinks: Float[Array, " H"] | None,
    normalizer: Callable,
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T"]]:
    """Return weights and log-normalizer of the scaled scores of the pairs `at`; see `reference`."""
    allowed = None if mask is None else mask.evaluate(at)
    if score is not None:
        scores = score(stop_masked_gradient(allowed, scores), at)
        scores = jnp.where(scores <= MASK_VALUE, -jnp.inf, scores)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    size = scores.shape[-1]
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights, lse = normalizer(scores)
    return weights[..., :size], lse


def stop_masked_gradient(allowed: Array | None, scores: Array) -> Array:
    """Stop the gradient of masked scores, where the gradient of a `Score` may be NaN."""
    return scores if allowed is None else jnp.where(allowed, scores, jax.lax.stop_gradient(scores))


def _dropout(weights: Array, rate: float, key: Array | None) -> Array:
    if rate == 0.0 or key is None:
        return weights
    keep = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(keep, weights / (1.0 - rate), 0.0)


class Reference:
    """All features of `attend`, in memory quadratic in the length; see `reference`."""

    name = "reference"

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        return sharded_length_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        result = AttentionResult(
            *reference(
                *(args.query, args.key, args.value),
                mask=args.mask,
                score=args.score,
                scale=args.scale,
                sinks=args.sinks,
                normalizer=args.normalizer,
                dropout_rate=args.dropout_rate,
                dropout_key=args.dropout_key,
                offset=offset,
            )
        )
        return result if args.return_weights else result._replace(weights=None)
