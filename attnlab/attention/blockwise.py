"""Attention a block of queries at a time: memory linear in the length, unreachable keys never visited.

Each block of query rows meets only the keys that the mask lets it reach, `MIN_BLOCK` rows at a time.
The backward pass recomputes the weights from the saved log-sum-exp instead of keeping them
(FlashAttention, arXiv 2205.14135, section 3.1 and algorithm 4).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.masks import Mask
from attnlab.attention.reference import group_heads
from attnlab.attention.scores import Score

MAX_BLOCKS = 16  # query blocks are unrolled: past this many they grow instead, and loop over their rows
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
    """Runs of query rows, multiples of `MIN_BLOCK` but for the last, each with the keys that it can reach."""
    rows = -(-num_queries // (MIN_BLOCK * MAX_BLOCKS)) * MIN_BLOCK
    whole = num_queries // MIN_BLOCK * MIN_BLOCK
    starts = list(range(0, whole, rows))
    stops = [min(start + rows, whole) for start in starts]
    if whole < num_queries:
        starts.append(whole)
        stops.append(num_queries)
    plan = []
    for start, stop in zip(starts, stops, strict=True):
        low, high = (0, num_keys) if mask is None else mask.reach(start, stop - 1, num_keys)
        plan.append((slice(start, stop), slice(low, high)))
    return plan


def _by_rows(step, carry, rows: slice, arrays):
    """Runs `step(carry, row numbers, those rows of each array)` over a block, `MIN_BLOCK` rows at a time.

    The rows of an array lie in its dimension 3, as do those of what `step` returns beside the carry.
    """
    numbers = jnp.arange(rows.start, rows.stop)
    parts = [a[:, :, :, rows] for a in arrays]
    count = len(numbers) // MIN_BLOCK
    if count <= 1:
        return step(carry, numbers, *parts)

    def split(a):
        return jnp.moveaxis(a.reshape(*a.shape[:3], count, MIN_BLOCK, *a.shape[4:]), 3, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 3).reshape(*a.shape[1:4], len(numbers), *a.shape[5:])

    inputs = (numbers.reshape(count, MIN_BLOCK), *map(split, parts))
    carry, results = jax.lax.scan(lambda carry, x: step(carry, *x), carry, inputs)
    return carry, jax.tree.map(join, results)


def _scores(q, k, mask: Mask | None, score: Score | None, scale: float, rows: Array, keys: slice):
    """Scores of some rows before masking, and a function that masks such an array with a fill value."""
    raw = scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    changed, pull_back = (raw, lambda g: (g,)) if score is None else jax.vjp(score, raw)
    if mask is None:
        return changed, pull_back, lambda x, fill: x
    allowed = group_heads(mask.block(rows, jnp.arange(keys.start, keys.stop)), k.shape[1])
    return changed, pull_back, lambda x, fill: jnp.where(allowed, x, fill)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(score, scale, query, key, value, mask):
    return _forward(score, scale, query, key, value, mask)[0]


def _forward(score, scale, query, key, value, mask):
    results = []
    for rows, keys in _blocks(query.shape[3], key.shape[2], mask):
        k, v = key[:, :, keys], value[:, :, keys]

        def step(_, numbers, q, k=k, v=v, keys=keys):
            scores, _, masked = _scores(q, k, mask, score, scale, numbers, keys)
            scores = masked(scores, -jnp.inf)
            top = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
            top = jnp.where(jnp.isneginf(top), 0, top)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            empty = total == 0
            total = jnp.where(empty, 1, total)
            out = jnp.einsum(
                "bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
            return None, ((out / total).astype(v.dtype), lse)

        results.append(_by_rows(step, None, rows, [query])[1])
    out, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*results, strict=True))
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
        k, v = key[:, :, keys], value[:, :, keys]

        def step(sums, numbers, q, g, delta, lse, k=k, v=v, keys=keys):
            scores, pull_back, masked = _scores(q, k, mask, score, scale, numbers, keys)
            weights = masked(jnp.exp(scores - lse[..., None]), 0)
            d_weights = jnp.einsum("bkgtd,bksd->bkgts", g, v, preferred_element_type=jnp.float32)
            (d_scores,) = pull_back(weights * (d_weights - delta[..., None]))
            d_scores = (scale * d_scores).astype(q.dtype)
            d_k = jnp.einsum("bkgts,bkgtd->bksd", d_scores, q).astype(jnp.float32)
            d_v = jnp.einsum("bkgts,bkgtd->bksd", weights.astype(g.dtype), g).astype(jnp.float32)
            d_q = jnp.einsum("bkgts,bksd->bkgtd", d_scores, k).astype(q.dtype)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        sums = d_key[:, :, keys], d_value[:, :, keys]
        sums, d_q = _by_rows(step, sums, rows, [query, d_out, delta, finite_lse])
        d_query.append(d_q)
        d_key, d_value = d_key.at[:, :, keys].set(sums[0]), d_value.at[:, :, keys].set(sums[1])
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
