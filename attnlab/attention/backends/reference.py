"""Reference attention: all scores in float32 (float64 for float64 inputs), with the weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.arrays import named_output, wide
from attnlab.attention.backends.registry import AttentionResult, sharded_length_reason
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.dense import zero_masked
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import BlockOffset, PairIndices, block_indices
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
    dropout: AttentionDropout | None = None,
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
      dropout: drops weights after the normalizer. None for no dropout.
      offset: indices of the first batch row, head, query and key, if the arrays are a shard.

    Returns:
      The output in the dtype of `value`, the log-sum-exp of the scores, and the weights before
      dropout. A query without keys has output 0, weights 0 and log-sum-exp -inf.
    """
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    group = h // max(k, 1)
    at = block_indices(offset, (b, h, t, s))
    allowed = None if mask is None else mask.evaluate(at)
    dtype = wide(query)
    query, keys, values = zero_masked(allowed, query, key, value)
    grouped = query.reshape(b, t, k, group, d).astype(dtype)
    scores = scale * _einsum("btkgd,bskd->bkgts", grouped, keys.astype(dtype)).reshape(b, h, t, s)
    weights, lse = attention_weights(scores, at, allowed, score, sinks, normalizer)
    kept = weights if dropout is None else dropout(weights, at)
    out = _einsum("bkgts,bskd->btkgd", kept.reshape(b, k, group, t, s), values.astype(dtype))
    (out,) = named_output(out.reshape(b, t, h, value.shape[-1]).astype(value.dtype))
    return out, jnp.moveaxis(lse, 1, 2), weights


def _einsum(subscripts: str, left: Array, right: Array) -> Array:
    """Return a product in full precision: by default, accelerators round float32 to fewer bits."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, left, right, precision=highest, preferred_element_type=left.dtype)


def attention_weights(
    scores: Float[Array, "B H T S"],
    at: PairIndices,
    allowed: Bool[Array, "#B #H #T #S"] | None,
    score: Score | None,
    sinks: Float[Array, " H"] | None,
    normalizer: Callable,
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T"]]:
    """Return weights and log-normalizer of the scaled scores of the pairs `at`; see `reference`."""
    if score is not None:
        scores = score(stop_masked_gradient(allowed, scores), at)
        scores = jnp.where(scores <= MASK_VALUE, -jnp.inf, scores)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    size = scores.shape[-1]
    if size == 0:  # one masked key, since there is no maximum over an empty axis
        scores = jnp.full((*scores.shape[:3], 1), -jnp.inf, scores.dtype)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights, lse = normalizer(scores)
    return weights[..., :size], lse


def stop_masked_gradient(allowed: Array | None, scores: Array) -> Array:
    """Stop the gradient of masked scores, where the gradient of a `Score` may be NaN."""
    return scores if allowed is None else jnp.where(allowed, scores, jax.lax.stop_gradient(scores))


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
                dropout=args.dropout,
                offset=offset,
            )
        )
        return result if args.return_weights else result._replace(weights=None)
