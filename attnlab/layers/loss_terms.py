"""Statistics of logits that losses need, computed in chunks of the vocabulary."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.attention.arrays import wide
from attnlab.layers.linear import bias_and_cap, gather_width, logits, vocab_axis
from attnlab.sharding import constrain, has_rules, has_sharded_length

# Maximum number of logits of a device in memory at once, and minimum number of columns of a chunk.
MAX_LOGITS, MIN_COLUMNS = 1 << 24, 8192


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


def token_loss_terms(
    x: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> LossTerms:
    """Return the loss terms of each token without materialising all logits.

    The logits are computed in chunks of the vocabulary. The backward pass recomputes the logits of
    each chunk. A chunk of the table's gradient is one product, and the gradient of `x` is summed
    over the chunks in at least float32. The table may be sharded over fsdp; then so is its
    gradient.
    """
    b, t, e = x.shape
    x, targets = constrain(x, "batch", "sequence", None), constrain(targets, "batch", "sequence")
    if (count := _num_chunks(x, table)) == 1:
        terms = _loss_terms(x, targets, table, bias, softcap, dtype)
    else:
        if not has_sharded_length(x):  # XLA's CPU backend is slow with two dimensions of rows
            x, targets = x.reshape(b * t, e), targets.reshape(b * t)
        terms = _chunked_loss_terms(x, targets, table, bias, softcap, dtype, count)
    return jax.tree.map(lambda a: constrain(a.reshape(b, t), "batch", None), terms)


def _loss_terms(x, targets, table, bias, softcap: float | None, dtype: str) -> LossTerms:
    y = logits(x, table, bias, softcap, dtype)
    y = y.astype(wide(y))
    ids = jnp.arange(y.shape[-1]).reshape(*[1] * targets.ndim, -1)
    target_logit = jnp.where(ids == targets[..., None], y, 0).sum(-1)
    correct = (target_logit >= jax.lax.stop_gradient(y.max(-1))).astype(y.dtype)
    return LossTerms(target_logit, jax.nn.logsumexp(y, axis=-1), y.mean(-1), correct)


class _Chunk(NamedTuple):
    """A chunk of each device's part of the vocabulary: n parts of c ids, with -1 as padding.

    The bias and the ids have a dimension of size 1 for each dimension of rows.
    """

    table: Float[Array, "n c E"]
    bias: Float[Array, "*ones n c"] | None
    ids: Int[Array, "*ones n c"]

    def logits(self, x, softcap: float | None, dtype: str) -> Float[Array, "*rows n c"]:
        """Return the logits in at least float32; -inf at padding."""
        y = _product("...e,nce->...nc", x, self.table, (*_rows(x), vocab_axis(self.table), None), dtype)
        y = bias_and_cap(y, self.bias, softcap)
        return jnp.where(self.ids >= 0, y.astype(wide(y)), -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked_loss_terms(x, targets, table, bias, softcap, dtype, count: int) -> LossTerms:
    """Return `_loss_terms`, computed in `count` chunks of each device's part of the vocabulary."""

    def step(_, chunk: _Chunk):
        y = chunk.logits(x, softcap, dtype)
        chosen = jnp.where(chunk.ids == targets[..., None, None], y, 0).sum(-1)
        total = jnp.where(chunk.ids >= 0, y, 0).sum(-1)
        return None, (chosen, jax.nn.logsumexp(y, axis=-1), total, y.max(-1))

    # Statistics of each chunk and each part of the vocabulary: (count, *rows, n).
    chunks = _chunks(x, gather_width(table), bias, count)
    _, (chosen, lse, total, largest) = jax.lax.scan(step, None, chunks)
    target_logit, mean_logit = chosen.sum((0, -1)), total.sum((0, -1)) / len(table)
    correct = (target_logit >= largest.max((0, -1))).astype(chosen.dtype)
    return LossTerms(target_logit, jax.nn.logsumexp(lse, axis=(0, -1)), mean_logit, correct)


def _forward(x, targets, table, bias, softcap, dtype, count: int):
    gathered = gather_width(table)
    terms = _chunked_loss_terms(x, targets, gathered, bias, softcap, dtype, count)
    return terms, (x, targets, table, gathered, bias, terms.lse)


def _backward(softcap, dtype, count: int, arrays, cotangents: LossTerms):
    x, targets, table, gathered, bias, lse = arrays
    targets, lse, d_target, d_lse, d_mean = (
        a[..., None, None]
        for a in (targets, lse, cotangents.target_logit, cotangents.lse, cotangents.mean_logit / len(table))
    )

    def step(d_x, chunk: _Chunk):
        y = chunk.logits(x, softcap, dtype)
        d_y = d_lse * jnp.exp(y - lse) + d_mean + jnp.where(chunk.ids == targets, d_target, 0)
        if softcap is not None:
            d_y *= 1 - (y / softcap) ** 2
        d_y = jnp.where(chunk.ids >= 0, d_y, 0)
        vocab = vocab_axis(chunk.table)
        d_table = _product("...nc,...e->nce", d_y, x, (vocab, None, embed), table.dtype)
        d_x += _product("...nc,nce->...ne", d_y, chunk.table, (*_rows(x), vocab, None), d_x.dtype)
        d_bias = None if bias is None else d_y.sum(range(d_y.ndim - 2)).astype(bias.dtype)
        return d_x, (d_table, d_bias)

    # A sum over the devices of fsdp is scattered: no device holds or receives all of it.
    embed = jax.typeof(table).sharding.spec[1] if has_rules() else None
    chunks = _chunks(x, gathered, bias, count)
    _, parts, _, e = chunks.table.shape
    where = jax.P(*_rows(x), vocab_axis(table), None) if has_rules() else None
    zeros = jnp.zeros((*x.shape[:-1], parts, e), wide(x), out_sharding=where)
    d_x, d_weights = jax.lax.scan(step, zeros, chunks)
    # Devices with other parts of the vocabulary add theirs in the dtype of x.
    d_x = jax.lax.reduce_sum(d_x.astype(x.dtype), axes=[x.ndim - 1])
    d_table, d_bias = jax.tree.map(partial(_join, vocab_size=len(table)), d_weights)
    return d_x, np.zeros(arrays[1].shape, jax.dtypes.float0), d_table, d_bias


_chunked_loss_terms.defvjp(_forward, _backward)


def _product(equation: str, a: Array, b: Array, axes: tuple, dtype) -> Array:
    """Return an einsum of this dtype whose dimensions are sharded over these mesh axes."""
    where = jax.P(*axes) if has_rules() else None
    return jnp.einsum(equation, a, b, preferred_element_type=dtype, out_sharding=where)


def _rows(x: Array) -> tuple:
    """Return the mesh axes of all dimensions but the last."""
    return tuple(jax.typeof(x).sharding.spec[:-1])


def _chunks(x: Array, table: Float[Array, "V E"], bias: Float[Array, " V"] | None, count: int) -> _Chunk:
    """Return the chunks, stacked along a new first dimension."""
    ids = jnp.arange(len(table))
    ids = jax.sharding.reshard(ids, jax.P(vocab_axis(table))) if has_rules() else ids
    ones = range(1, x.ndim)
    biases = None if bias is None else jnp.expand_dims(_split(bias, count), ones)
    return _Chunk(_split(table, count), biases, jnp.expand_dims(_split(ids, count, padding=-1), ones))


def _split(a: Array, count: int, padding: int = 0) -> Array:
    """Return (count, n, c, ...) of (V, ...), where the vocabulary is on n devices."""
    v, *rest = a.shape
    parts = v // _local_shape(a)[0]
    where = jax.P(vocab_axis(a)) if has_rules() else None
    a = a.reshape(parts, v // parts, *rest, out_sharding=where)
    a = jnp.pad(a, [(0, 0), (0, -(v // parts) % count), *((0, 0) for _ in rest)], constant_values=padding)
    return jnp.moveaxis(a.reshape(parts, count, -1, *rest), 1, 0)


def _join(a: Array, vocab_size: int) -> Array:
    """Return (V, ...) of (count, n, c, ...), the inverse of `_split`."""
    count, parts, size, *rest = a.shape
    _, vocab, _, *axes = jax.typeof(a).sharding.spec
    a = jnp.moveaxis(a, 0, 1).reshape(parts, count * size, *rest)[:, : vocab_size // parts]
    where = jax.P(vocab, *axes) if has_rules() else None
    return a.reshape(vocab_size, *rest, out_sharding=where)


def _num_chunks(x: Array, table: Array) -> int:
    """Return the number of chunks of a device's vocabulary: at most `MAX_LOGITS` logits in each.

    Each chunk adds to the gradient of all rows, which costs more than the logits if a chunk has
    few columns. So it has at least `MIN_COLUMNS`. A number that divides the vocabulary needs no
    copy of the table with padding.
    """
    *rows, _ = _local_shape(x)
    vocab = _local_shape(table)[0]
    count = -(-vocab // max(MAX_LOGITS // max(math.prod(rows), 1), MIN_COLUMNS))
    return next((n for n in range(count, 2 * count) if vocab % n == 0), count)


def _local_shape(a: Array) -> tuple[int, ...]:
    sharding = jax.typeof(a).sharding
    return a.shape if sharding.mesh.empty else sharding.shard_shape(a.shape)
