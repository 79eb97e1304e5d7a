"""Logits, and the statistics of logits that losses need, computed in chunks of the length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.sharding import gathered_param_spec, out_sharding

# Maximum number of logits in memory at once; larger batches are processed in chunks of the length.
MAX_LOGITS = 1 << 24


class LossTerms(NamedTuple):
    """Statistics of each token's logits that losses and metrics use, float32 (B, T).

    Attributes:
      target_logit: logit of the target.
      lse: log-sum-exp of the logits; lse - target_logit is the cross-entropy.
      mean_logit: mean of the logits over the vocabulary, for label smoothing.
      correct: 1 where no logit is greater than the target's, else 0.
    """

    target_logit: Float[Array, "B T"]
    lse: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    correct: Float[Array, "B T"]


def logits(
    x: Float[Array, "B T E"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> Float[Array, "B T V"]:
    """Return x table^T + bias, softcapped to softcap * tanh(. / softcap) if `softcap` is set."""
    b, t, e = x.shape
    rows, vocab = out_sharding("batch"), None
    if rows is not None:
        rows, vocab = rows[0], gathered_param_spec(table.shape, ("vocab", "embed"))[0]
    where = None if rows is None else jax.P(rows, vocab)
    y = jnp.einsum("ne,ve->nv", x.reshape(b * t, e), table, preferred_element_type=dtype, out_sharding=where)
    if bias is not None:
        y = y + bias.astype(dtype)[None]
    if softcap is not None:
        y = softcap * jnp.tanh(y / softcap)
    return y.reshape(b, t, -1, out_sharding=None if rows is None else jax.P(rows, None, vocab))


def token_loss_terms(
    x: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> LossTerms:
    """Return the loss terms of each token without materialising all logits.

    The length is processed in chunks, and the backward pass recomputes the logits of each chunk.
    """

    def chunk_loss_terms(x, targets):
        y = logits(x, table, bias, softcap, dtype).astype(jnp.float32)
        is_target = jnp.arange(y.shape[-1])[None, None] == targets[..., None]
        target_logit = jnp.where(is_target, y, 0).sum(-1)
        correct = (target_logit >= jax.lax.stop_gradient(y.max(-1))).astype(jnp.float32)
        return LossTerms(target_logit, jax.nn.logsumexp(y, axis=-1), y.mean(-1), correct)

    count = _num_chunks(x, table.shape[0])
    if count == 1:
        return chunk_loss_terms(x, targets)

    def split(a):
        b, t, *rest = a.shape
        return jnp.moveaxis(a.reshape(b, count, t // count, *rest), 1, 0)

    _, parts = jax.lax.scan(
        lambda _, part: (None, jax.checkpoint(chunk_loss_terms)(*part)), None, (split(x), split(targets))
    )
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(targets.shape), parts)


def _num_chunks(x: Array, vocab: int) -> int:
    """Return the smallest number of equal chunks with at most MAX_LOGITS logits per device."""
    sharding = jax.typeof(x).sharding
    b, t = sharding.shard_shape(x.shape)[:2] if not sharding.mesh.empty else x.shape[:2]
    return next(c for c in range(1, t + 1) if t % c == 0 and (b * (t // c) * vocab <= MAX_LOGITS or c == t))
