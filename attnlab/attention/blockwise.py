"""Attention a block of queries at a time: memory linear in the length, unreachable keys never visited.

Each block of query rows meets only the keys that the mask lets it reach. The backward pass recomputes
the weights from the saved log-sum-exp instead of keeping them (FlashAttention, arXiv 2205.14135,
section 3.1 and algorithm 4).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.masks import Mask
from attnlab.attention.reference import group_heads
from attnlab.attention.scores import Score

MAX_BLOCKS = 16  # query blocks are unrolled: past this many they grow instead
MIN_BLOCK = 64  # rows; measured best on CPU, where one block's scores then stay in cache


def blockwise(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None,
    score: Score | None,
    scale: float,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and log-sum-exp of `reference`, without ever holding a full score matrix."""
    b, t, h, d = query.shape
    k = key.shape[2]
    # Heads become a batch dimension, so that every product is one plain batched matrix product.
    grouped = jnp.transpose(query.reshape(b, t, k, h // k, d), (0, 2, 3, 1, 4))
    out, lse = _attend(score, scale, grouped, _heads_first(key), _heads_first(value), mask)
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, h, -1)
    return out, jnp.transpose(lse, (0, 3, 1, 2)).reshape(b, t, h)


def _heads_first(x: Float[Array, "B S K D"]) -> Float[Array, "B K S D"]:
    return jnp.swapaxes(x, 1, 2)


def _blocks(num_queries: int, num_keys: int, mask: Mask | None) -> list[tuple[slice, slice]]:
    """Runs of query rows, each with the run of keys it can reach."""
    rows = max(MIN_BLOCK, -(-num_queries // MAX_BLOCKS))
    plan = []
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        low, high = (0, num_keys) if mask is None else mask.reach(start, stop - 1, num_keys)
        plan.append((slice(start, stop), slice(low, high)))
    return plan


def _scores(q, k, mask: Mask | None, score: Score | None, scale: float, rows: slice, keys: slice):
    """Scores of one block before masking, and a function that masks such an array with a fill value."""
    raw = scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    changed, pull_back = (raw, lambda g: (g,)) if score is None else jax.vjp(score, raw)
    if mask is None:
        return changed, pull_back, lambda x, fill: x
    allowed = mask.block(jnp.arange(rows.start, rows.stop), jnp.arange(keys.start, keys.stop))
    allowed = group_heads(allowed, k.shape[1])
    return changed, pull_back, lambda x, fill: jnp.where(allowed, x, fill)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(score, scale, query, key, value, mask):
    return _forward(score, scale, query, key, value, mask)[0]


def _forward(score, scale, query, key, value, mask):
    outs, lses = [], []
    for rows, keys in _blocks(query.shape[3], key.shape[2], mask):
        scores, _, masked = _scores(query[:, :, :, rows], key[:, :, keys], mask, score, scale, rows, keys)
        scores = masked(scores, -jnp.inf)
        top = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
        top = jnp.where(jnp.isneginf(top), 0, top)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        values = value[:, :, keys]
        out = jnp.einsum(
            "bkgts,bksd->bkgtd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        outs.append((out / total).astype(value.dtype))
        lses.append(jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0])
    out, lse = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
    return (out, lse), (query, key, value, mask, out, lse)


def _backward(score, scale, residuals, gradients):
    query, key, value, mask, out, lse = residuals
    d_out, d_lse = gradients
    # d scores = weights * (d weights - sum(weights * d weights) + d lse); the sum is out . d out.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    d_query = []
    d_key = jnp.zeros(key.shape, jnp.float32)
    d_value = jnp.zeros(value.shape, jnp.float32)
    for rows, keys in _blocks(query.shape[3], key.shape[2], mask):
        q, k, v, g = query[:, :, :, rows], key[:, :, keys], value[:, :, keys], d_out[:, :, :, rows]
        scores, pull_back, masked = _scores(q, k, mask, score, scale, rows, keys)
        weights = masked(jnp.exp(scores - finite_lse[:, :, :, rows, None]), 0)
        d_weights = jnp.einsum("bkgtd,bksd->bkgts", g, v, preferred_element_type=jnp.float32)
        (d_scores,) = pull_back(weights * (d_weights - delta[:, :, :, rows, None]))
        d_scores = (scale * d_scores).astype(q.dtype)
        d_query.append(jnp.einsum("bkgts,bksd->bkgtd", d_scores, k).astype(query.dtype))
        d_key = d_key.at[:, :, keys].add(jnp.einsum("bkgts,bkgtd->bksd", d_scores, q))
        d_value = d_value.at[:, :, keys].add(jnp.einsum("bkgts,bkgtd->bksd", weights.astype(g.dtype), g))
    no_gradient = jax.tree.map(_zero_gradient, mask)
    return (
        jnp.concatenate(d_query, axis=3),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        no_gradient,
    )


def _zero_gradient(x):
    """The cotangent of an integer or boolean leaf of a mask."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
