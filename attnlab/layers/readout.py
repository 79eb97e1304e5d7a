"""Logits, and the statistics of logits that losses need, computed in chunks of the length."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.sharding import gathered_param_spec, out_sharding

# Maximum number of logits of a device in memory at once, and minimum number of rows of a chunk.
MAX_LOGITS, MIN_ROWS = 1 << 24, 1024


class LossTerms(NamedTuple):
    """Statistics of each token's logits that losses and metrics use, (B, T), in at least float32.

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


def scaled(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Return x times a constant in the dtype of x, without rounding the constant to that dtype."""
    return (x * jnp.asarray(scale, jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


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

    The length is processed in chunks. The backward pass recomputes the logits of each chunk, and
    sums the gradients of the table and the bias over the chunks in at least float32.
    """
    length = _chunk_length(x, table)
    if length == x.shape[1]:
        return _loss_terms(x, targets, table, bias, softcap, dtype)
    return _chunked_loss_terms(x, targets, table, bias, softcap, dtype, length)


def _loss_terms(x, targets, table, bias, softcap: float | None, dtype: str) -> LossTerms:
    y = logits(x, table, bias, softcap, dtype)
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    is_target = jnp.arange(y.shape[-1])[None, None] == targets[..., None]
    target_logit = jnp.where(is_target, y, 0).sum(-1)
    correct = (target_logit >= jax.lax.stop_gradient(y.max(-1))).astype(y.dtype)
    return LossTerms(target_logit, jax.nn.logsumexp(y, axis=-1), y.mean(-1), correct)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked_loss_terms(x, targets, table, bias, softcap, dtype, length: int) -> LossTerms:
    """Return `_loss_terms`, computed in chunks of `length` tokens of each row."""

    def step(_, chunk):
        return None, _loss_terms(*chunk, table, bias, softcap, dtype)

    _, parts = jax.lax.scan(step, None, (_split(x, length), _split(targets, length)))
    return jax.tree.map(lambda a: _join(a, x.shape[1]), parts)


def _forward(x, targets, table, bias, softcap, dtype, length: int):
    terms = _chunked_loss_terms(x, targets, table, bias, softcap, dtype, length)
    return terms, (x, targets, table, bias)


def _backward(softcap, dtype, length: int, arrays, cotangents: LossTerms):
    x, targets, table, bias = arrays

    def step(sums, chunk):
        x, targets, cotangents = chunk

        def terms(x, weights):
            return _loss_terms(x, targets, *weights, softcap, dtype)

        _, vjp = jax.vjp(terms, x, (table, bias))
        d_x, d_weights = vjp(cotangents)
        return jax.tree.map(lambda total, d: total + d.astype(total.dtype), sums, d_weights), d_x

    weights = table, bias
    sums = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.promote_types(w.dtype, jnp.float32)), weights)
    chunks = jax.tree.map(lambda a: _split(a, length), (x, targets, cotangents))
    sums, d_x = jax.lax.scan(step, sums, chunks)
    d_table, d_bias = jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights)
    return _join(d_x, x.shape[1]), np.zeros(targets.shape, jax.dtypes.float0), d_table, d_bias


_chunked_loss_terms.defvjp(_forward, _backward)


def _split(a: Array, length: int) -> Array:
    """Return (N, B, length, ...), the length padded with zeros to a multiple of `length`."""
    b, t, *rest = a.shape
    a = jnp.pad(a, [(0, 0), (0, -t % length), *((0, 0) for _ in rest)])
    return jnp.moveaxis(a.reshape(b, -1, length, *rest), 1, 0)


def _join(chunks: Array, t: int) -> Array:
    """Return (B, t, ...), the inverse of `_split`."""
    a = jnp.moveaxis(chunks, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :t]


def _chunk_length(x: Array, table: Array) -> int:
    """Return the tokens of each row in a chunk: at most `MAX_LOGITS` logits per device.

    Each chunk reads the whole table, which costs more than the logits if a chunk has few rows. So
    it has at least `MIN_ROWS` rows per device. The chunks are as equal as possible.
    """
    (rows, t, _), (vocab, _) = (_local_shape(a) for a in (x, table))
    length = max(MAX_LOGITS // (rows * vocab), -(-MIN_ROWS // rows))
    count = -(-t // length)
    return -(-t // count)


def _local_shape(a: Array) -> tuple[int, ...]:
    sharding = jax.typeof(a).sharding
    return a.shape if sharding.mesh.empty else sharding.shard_shape(a.shape)
