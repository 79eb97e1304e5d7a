"""Logits, and the statistics of logits that losses need, computed in chunks of the length."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.sharding import axis_size, constrain, gathered_param_spec, length_axes, out_sharding

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
    x: Float[Array, "*rows E"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> Float[Array, "*rows V"]:
    """Return x table^T + bias, softcapped to softcap * tanh(. / softcap) if `softcap` is set."""
    *rows, e = x.shape
    if len(rows) == 2:
        x = constrain(x, "batch", "sequence", None)
    where = whole = None
    if (batch := out_sharding("batch")) is not None:
        vocab = gathered_param_spec(table.shape, ("vocab", "embed"))[0]
        where, whole = jax.P(batch[0], vocab), jax.P(*jax.typeof(x).sharding.spec[:-1], vocab)
    if whole is not None and any(whole[1:-1]):  # two sharded dimensions cannot be merged
        y = jnp.einsum("...e,ve->...v", x, table, preferred_element_type=dtype, out_sharding=whole)
    else:
        flat = x.reshape(math.prod(rows), e)
        y = jnp.einsum("ne,ve->nv", flat, table, preferred_element_type=dtype, out_sharding=where)
    if bias is not None:
        y = y + bias.astype(dtype).reshape(*[1] * (y.ndim - 1), -1)
    if softcap is not None:
        y = softcap * jnp.tanh(y / softcap)
    return y.reshape(*rows, -1, out_sharding=whole)


def token_loss_terms(
    x: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> LossTerms:
    """Return the loss terms of each token without materialising all logits.

    Each shard of the length is processed in chunks. The backward pass recomputes the logits of each
    chunk, and sums the gradients of the table and the bias over the chunks in at least float32.
    """
    b, t, e = x.shape
    shards = 1 if length_axes("sequence", t) is None else axis_size("sequence")
    x, targets = constrain(x, "batch", "sequence", None), constrain(targets, "batch", "sequence")
    x, targets = x.reshape(b, shards, t // shards, e), targets.reshape(b, shards, t // shards)
    length = _chunk_length(x, table)
    if length == x.shape[2]:
        terms = _loss_terms(x, targets, table, bias, softcap, dtype)
    else:
        terms = _chunked_loss_terms(x, targets, table, bias, softcap, dtype, length)
    return jax.tree.map(lambda a: constrain(a.reshape(b, t), "batch", None), terms)


def _loss_terms(x, targets, table, bias, softcap: float | None, dtype: str) -> LossTerms:
    y = logits(x, table, bias, softcap, dtype)
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    ids = jnp.arange(y.shape[-1]).reshape(*[1] * targets.ndim, -1)
    target_logit = jnp.where(ids == targets[..., None], y, 0).sum(-1)
    correct = (target_logit >= jax.lax.stop_gradient(y.max(-1))).astype(y.dtype)
    return LossTerms(target_logit, jax.nn.logsumexp(y, axis=-1), y.mean(-1), correct)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked_loss_terms(x, targets, table, bias, softcap, dtype, length: int) -> LossTerms:
    """Return `_loss_terms`, computed in chunks of `length` tokens of each shard of a row."""

    def step(_, chunk):
        return None, _loss_terms(*chunk, table, bias, softcap, dtype)

    _, parts = jax.lax.scan(step, None, (_split(x, length), _split(targets, length)))
    return jax.tree.map(lambda a: _join(a, x.shape[2]), parts)


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
    return _join(d_x, x.shape[2]), np.zeros(targets.shape, jax.dtypes.float0), d_table, d_bias


_chunked_loss_terms.defvjp(_forward, _backward)


def _split(a: Array, length: int) -> Array:
    """Return (N, B, shards, length, ...) of (B, shards, t, ...), with t padded with zeros."""
    b, shards, t, *rest = a.shape
    a = jnp.pad(a, [(0, 0), (0, 0), (0, -t % length), *((0, 0) for _ in rest)])
    return jnp.moveaxis(a.reshape(b, shards, -(-t // length), length, *rest), 2, 0)


def _join(chunks: Array, t: int) -> Array:
    """Return (B, shards, t, ...), the inverse of `_split`."""
    a = jnp.moveaxis(chunks, 0, 2)
    b, shards, count, length, *rest = a.shape
    return a.reshape(b, shards, count * length, *rest)[:, :, :t]


def _chunk_length(x: Array, table: Array) -> int:
    """Return the tokens of each shard of a row in a chunk: at most `MAX_LOGITS` logits per device.

    Each chunk reads the whole table, which costs more than the logits if a chunk has few rows. So
    it has at least `MIN_ROWS` rows per device. The chunks are as equal as possible.
    """
    (rows, _, t, _), (vocab, _) = (_local_shape(a) for a in (x, table))
    length = max(MAX_LOGITS // (rows * vocab), -(-MIN_ROWS // rows))
    count = -(-t // length)
    return -(-t // count)


def _local_shape(a: Array) -> tuple[int, ...]:
    sharding = jax.typeof(a).sharding
    return a.shape if sharding.mesh.empty else sharding.shard_shape(a.shape)
