"""The oracle: the full score matrix in float32 (float64 stays float64), and the weights themselves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends.registry import AttentionResult, sharded_length_reason
from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import PairIndices, block_indices
from attnlab.attention.scores import Score

# A changed score that is no more than this forbids its pair, whichever backend sees it, and however many
# others its row has. Finite, for where backends keep a running maximum, inf - inf would be no number.
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
    """softmax(score(scale * Q K^T)) V with every pair written out (Vaswani et al. 2017, equation 1).

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: which pairs may attend; None is all.
      score: change of the scaled scores.
      scale: factor of the scores.
      sinks: a further score of every row that takes weight and gives nothing, (H,).
      normalizer: masked scores -> weights and their logarithmic normaliser, over the last axis.
      dropout_rate: share of weights dropped, where `dropout_key` is given.
      dropout_key: random key of the dropout.
      offset: the first batch row, head, query and key, where these are part of a whole.

    Returns:
      The output in the value's dtype, the log-sum-exp of the scores, and the weights. A query with
      no key to attend to gets output 0, weights 0 and log-sum-exp -inf.
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
    """Weights, and logarithmic normaliser, of the scaled scores of the pairs `at`; see `reference`."""
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
    """The scores, with a gradient only where allowed: elsewhere that of a change may be no number."""
    return scores if allowed is None else jnp.where(allowed, scores, jax.lax.stop_gradient(scores))


def _dropout(weights: Array, rate: float, key: Array | None) -> Array:
    if rate == 0.0 or key is None:
        return weights
    keep = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(keep, weights / (1.0 - rate), 0.0)


class Reference:
    """Everything, in memory quadratic in the length; see `reference`."""

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
