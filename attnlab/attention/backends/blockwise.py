"""Attention a tile at a time: memory linear in the length, empty tiles never visited, full ones not masked.

The forward pass keeps a running maximum and sum of each row (Milakov and Gimelshein 2018, arXiv
1805.02867, algorithm 3); the backward pass recomputes the weights from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends import vjp as cotangents
from attnlab.attention.backends.reference import NOTHING, stop_masked_gradient
from attnlab.attention.backends.registry import (
    AttentionResult,
    apply_sinks,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import Known, Plan, equal_part, plan
from attnlab.attention.masks.base import BlockGrid, BlockOffset, Mask
from attnlab.attention.pairwise import block_indices
from attnlab.attention.scores import Score


def blockwise(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    first: BlockOffset = (0, 0, 0, 0),
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and log-sum-exp of `reference`, without ever holding a full score matrix.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: which pairs may attend; None is all.
      score: change of the scaled scores.
      scale: factor of the scores.
      first: the first batch row, head, query and key, where these are part of a whole.
      tile: how many queries and keys are met at a time.
    """
    if query.dtype == jnp.float32 or not isinstance(scale, float):
        query, scale = query * scale, 1.0  # a pass over the queries in place of one over the scores
    call = _Call(query.shape, key.shape, mask, score, scale, first, tile)
    arrays = call.grouped(query), call.by_heads(key), call.by_heads(value)
    out, lse = _attend(call.static, *arrays, *call.values)
    return call.ungrouped(out), call.ungrouped(lse)


def gradients(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    d_out: Float[Array, "B T H Dv"],
    lse: Float[Array, "B T H"],
    delta: Float[Array, "B T H"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    first: BlockOffset = (0, 0, 0, 0),
):
    """What these keys and values add to the gradient of a softmax that other keys may have a part in.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      d_out: gradient of the output.
      lse: log-sum-exp over all keys, these and others.
      delta: sum(output * d_out) over the width, less the gradient of `lse`.
      mask: as in `blockwise`.
      score: as in `blockwise`.
      scale: as in `blockwise`.
      first: as in `blockwise`.

    Returns:
      The gradients of query, key and value, in float32, and of each array of the score.
    """
    call = _Call(query.shape, key.shape, mask, score, scale, first)
    rows = (call.grouped(x) for x in (d_out, lse, delta))
    arrays = call.grouped(query), call.by_heads(key), call.by_heads(value)
    d_query, d_key, d_value, d_score = _gradients(call.static, *arrays, *call.values, *rows)
    s = key.shape[1]
    d_key, d_value = (jnp.swapaxes(x, 1, 2)[:, :s] for x in (d_key, d_value))
    return call.ungrouped(d_query), d_key, d_value, cotangents.finish(score, d_score)


def blockwise_autodiff(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    first: BlockOffset = (0, 0, 0, 0),
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """`blockwise` differentiated by JAX itself: slower, but forward-mode and second derivatives exist.

    The arguments are those of `blockwise`.
    """
    call = _Call(query.shape, key.shape, mask, score, scale, first, tile, written_out=False)
    query, key, value = call.grouped(query), call.by_heads(key), call.by_heads(value)
    tiles = _Tiles(call.static, *call.values)
    order, unmasked, visited = (jnp.asarray(x) for x in tiles.plan)

    def queries(_, i):
        visit = _online(tiles, _slice(query, i, tiles.rows, 3), key, value, i)

        @jax.checkpoint
        def step(carry, n):
            sort = jnp.where(n < unmasked[i], 1, jnp.where(n < visited[i], 2, 0))
            ways = [
                lambda c: c,
                lambda c: visit(c, order[i, n], False),
                lambda c: visit(c, order[i, n], True),
            ]
            return jax.lax.switch(sort, ways, carry), None

        carry, _ = jax.lax.scan(step, _start(tiles, query, value), jnp.arange(order.shape[1]))
        return None, _finish(carry, value.dtype)

    _, (out, lse) = tiles.over_queries(queries, None)
    return call.ungrouped(out), call.ungrouped(lse)


class _Call:
    """The layout of one call: heads are a batch dimension, so that every product is a plain batched one."""

    def __init__(self, query_shape, key_shape, mask, score, scale, first, tile=None, written_out=True):
        b, t, self.heads, _ = query_shape
        s, self.kv_heads = key_shape[1:3]
        rows, columns = tile or tile_of(t, s)
        grid = BlockGrid(t, s, rows, columns, b, self.heads, first)
        made, known = plan(mask, grid)
        if not written_out:
            known = Known()
        self.num_queries, count, width = t, *grid.num_blocks
        self.lengths = {"queries": count * rows, "keys": width * columns}
        mask, score = (x if x is None else x.pad_to(**self.lengths) for x in (mask, score))
        self.static = rows, columns, s, known, scale
        self.values = mask, score, made, first

    def grouped(self, x):
        """(B, T, H, ...) as (B, K, G, T', ...), T' a whole number of tiles."""
        x = _pad(x, self.lengths["queries"])
        x = x.reshape(*x.shape[:2], self.kv_heads, self.heads // self.kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def by_heads(self, x):
        """(B, S, K, D) as (B, K, S', D), S' a whole number of tiles."""
        return jnp.swapaxes(_pad(x, self.lengths["keys"]), 1, 2)

    def ungrouped(self, x):
        """(B, K, G, T', ...) as (B, T, H, ...)."""
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(*x.shape[:2], self.heads, *x.shape[4:])[:, : self.num_queries]


def tile_of(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Queries and keys of a tile, as was fastest on CPUs, where the scores of a tile should stay in cache.

    Short sequences have small ones, of which a causal mask leaves out more.
    """
    if num_queries <= 1024 and num_keys <= 1024:
        rows, columns = (equal_part(n, min(128, max(64, -(-n // 4)))) for n in (num_queries, num_keys))
        return rows, columns
    return equal_part(num_queries, 256), equal_part(num_keys, 512)


def _pad(x: Array, length: int) -> Array:
    more = length - x.shape[1]
    return jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)]) if more else x


def _slice(x: Array, i, size: int, axis: int) -> Array:
    """The i-th run of `size` along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


class _Tiles:
    """The tiles of one call: their scores, and loops over those that the plan visits."""

    def __init__(self, static, mask: Mask | None, score: Score | None, made: Plan, first: BlockOffset):
        self.rows, self.columns, self.num_keys, self.known, self.scale = static
        self.mask, self.score, self.plan, self.first = mask, score, made, first

    def _at(self, i, j, batch: int, heads: int):
        b, h, q, k = self.first
        first = b, h, q + i * self.rows, k + j * self.columns
        return block_indices(first, (batch, heads, self.rows, self.columns))

    def slice_block(self, value, i, j):
        """A mask or score with its arrays cut to a tile."""
        return value.slice_block(queries=(i * self.rows, self.rows), keys=(j * self.columns, self.columns))

    def scores(self, q, k, i, j, masked: bool):
        """A tile's scores, (B, K, G, rows, columns), and the pull-back to its products and its `Score`."""
        raw = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
        shape, flat = raw.shape, (raw.shape[0], raw.shape[1] * raw.shape[2], *raw.shape[3:])
        at = self._at(i, j, *flat[:2])
        allowed = self._allowed(at, i, j, flat) if masked else None
        scores, pull_back = self._scaled(raw), lambda g: (self._scaled(g), None)
        if self.score is not None:
            changed, through = jax.vjp(
                lambda x, score: score(stop_masked_gradient(allowed, x), at),
                scores.reshape(flat),
                self.slice_block(self.score, i, j),
            )
            scores = changed.reshape(shape)

            def pull_back(g):
                g, g_score = through(g.reshape(flat))
                return self._scaled(g.reshape(shape)), g_score

        if allowed is not None:
            grouped = (1, 1) if allowed.shape[1] == 1 else shape[1:3]
            scores = jnp.where(allowed.reshape(-1, *grouped, *shape[3:]), scores, NOTHING)
        return scores, pull_back

    def _allowed(self, at, i, j, shape):
        """The pairs of a tile that are allowed, (B or 1, H or 1, rows, columns)."""
        local = j * self.columns + jnp.arange(self.columns)
        allowed = (local < self.num_keys)[None, None, None, :]
        if self.mask is not None:
            allowed = allowed & self.slice_block(self.mask, i, j).evaluate(at)
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], *shape[2:]))

    def _scaled(self, x):
        return x if self.scale == 1 else self.scale * x

    def over_keys(self, step, carry, i):
        """`step(carry, j, masked)` for every tile of keys that queries `i` meet."""
        if self.known.visits is not None:
            for j, masked in self.known.visits[i]:
                carry = step(carry, j, masked)
            return carry
        order, unmasked, visited = (jnp.asarray(x)[i] for x in self.plan)
        if self.known.unmasked:
            carry = jax.lax.fori_loop(0, unmasked, lambda n, c: step(c, order[n], False), carry)
        if self.known.masked:
            carry = jax.lax.fori_loop(unmasked, visited, lambda n, c: step(c, order[n], True), carry)
        return carry

    def over_queries(self, step, carry):
        """`step(carry, i)` for every tile of queries; what it returns beside the carry joined along rows."""
        count = len(self.plan.unmasked)
        if self.known.visits is not None:
            results = []
            for i in range(count):
                carry, result = step(carry, i)
                results.append(result)
            return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)
        carry, parts = jax.lax.scan(step, carry, jnp.arange(count))

        def join(x):
            x = jnp.moveaxis(x, 0, 3)
            return x.reshape(*x.shape[:3], count * self.rows, *x.shape[5:])

        return carry, jax.tree.map(join, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, mask, score, made, first):
    return _forward(static, query, key, value, mask, score, made, first)[0]


def _forward(static, query, key, value, mask, score, made, first):
    tiles = _Tiles(static, mask, score, made, first)

    def queries(_, i):
        step = _online(tiles, _slice(query, i, tiles.rows, 3), key, value, i)
        return None, _finish(tiles.over_keys(step, _start(tiles, query, value), i), value.dtype)

    _, (out, lse) = tiles.over_queries(queries, None)
    return (out, lse), (query, key, value, mask, score, made, first, out, lse)


def _online(tiles: _Tiles, q, key, value, i):
    """A step of the running maximum, sum and output of the queries of tile i."""

    def step(carry, j, masked):
        top, total, out = carry
        k, v = (_slice(x, j, tiles.columns, 2) for x in (key, value))
        scores, _ = tiles.scores(q, k, i, j, masked)
        # The result does not depend on the maximum, nor do its derivatives.
        new_top = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        more = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_top, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + more

    return step


def _start(tiles: _Tiles, query, value):
    row = (*query.shape[:3], tiles.rows)
    return jnp.full(row, NOTHING), jnp.zeros(row), jnp.zeros((*row, value.shape[-1]))


def _finish(carry, dtype):
    """The output and log-sum-exp of rows whose keys have all been met."""
    top, total, out = carry
    empty = top <= NOTHING
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty[..., None], 0, out / total[..., None])
    return out.astype(dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _backward(static, residuals, given):
    query, key, value, mask, score, made, first, out, lse = residuals
    d_out, d_lse = given
    delta = cotangents.delta(out, d_out, d_lse)
    arrays = query, key, value
    *found, d_score = _gradients(static, *arrays, mask, score, made, first, d_out, lse, delta)
    found = [g.astype(x.dtype) for x, g in zip(arrays, found, strict=True)]
    nothing = cotangents.nothing
    return (*found, nothing(mask), cotangents.finish(score, d_score), nothing(made), nothing(first))


def _gradients(static, query, key, value, mask, score, made, first, d_out, lse, delta):
    tiles = _Tiles(static, mask, score, made, first)
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    # Gradients of keys and values are summed with the width before the length, (B, K, D, S): products with
    # a tile of scores on the right, as it is, are twice as fast on CPUs as those with its transpose.
    by_width = [jnp.moveaxis(x, -1, 2) for x in (query, d_out)]

    def queries(sums, i):
        q, g, minus, norm = (_slice(x, i, tiles.rows, 3) for x in (query, d_out, delta, finite_lse))
        q_by_width, g_by_width = (_slice(x, i, tiles.rows, 4) for x in by_width)

        def step(carry, j, masked):
            d_q, (d_key, d_value, d_score) = carry
            k, v = (_slice(x, j, tiles.columns, 2) for x in (key, value))
            scores, pull_back = tiles.scores(q, k, i, j, masked)
            weights = jnp.exp(scores - norm[..., None])
            d_weights = jnp.einsum("bkgtd,bksd->bkgts", g, v, preferred_element_type=jnp.float32)
            d_scores, d_score_tile = pull_back(weights * (d_weights - minus[..., None]))
            d_scores = d_scores.astype(q.dtype)
            d_k = _to_keys(q_by_width, d_scores)
            d_v = _to_keys(g_by_width, weights.astype(g.dtype))
            d_q += jnp.einsum("bkgts,bksd->bkgtd", d_scores, k, preferred_element_type=jnp.float32)
            sums = (
                _add(d_key, d_k, j * tiles.columns, 3),
                _add(d_value, d_v, j * tiles.columns, 3),
                cotangents.add(score, d_score, d_score_tile, queries=i * tiles.rows, keys=j * tiles.columns),
            )
            return d_q, sums

        d_q, sums = tiles.over_keys(step, (jnp.zeros(q.shape), sums), i)
        return sums, d_q

    zeros = [jnp.zeros(jnp.swapaxes(x, 2, 3).shape) for x in (key, value)]
    (d_key, d_value, d_score), d_query = tiles.over_queries(queries, (*zeros, cotangents.zeros(score)))
    return d_query, jnp.swapaxes(d_key, 2, 3), jnp.swapaxes(d_value, 2, 3), d_score


def _to_keys(rows: Array, tile: Array) -> Array:
    """What each key gets of rows (B, K, D, G, T) by a tile of scores, (B, K, D, S)."""
    return jnp.einsum("bkdgt,bkgts->bkds", rows, tile, preferred_element_type=jnp.float32)


def _add(total: Array, part: Array, start, axis: int) -> Array:
    """`total` with `part` added from `start` on."""
    there = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part, start, axis)


_attend.defvjp(_forward, _backward)


class Blockwise:
    """Any mask and score in memory linear in the length; see `blockwise`."""

    name = "blockwise"
    function = staticmethod(blockwise)

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        return softmax_only_reason(args) or sharded_length_reason(args)

    def run(self, args, first):
        """See `Backend.run`."""
        out, lse = self.function(
            args.query, args.key, args.value, mask=args.mask, score=args.score, scale=args.scale, first=first
        )
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


class BlockwiseAutodiff(Blockwise):
    """The same with forward-mode and second derivatives; see `blockwise_autodiff`."""

    name = "blockwise_autodiff"
    function = staticmethod(blockwise_autodiff)
