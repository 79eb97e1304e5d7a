"""Blockwise attention in plain JAX: memory linear in the length, empty blocks skipped.

Full blocks are not masked. The forward pass keeps a running maximum and sum of each row (Milakov
and Gimelshein 2018, arXiv 1805.02867, algorithm 3). The backward pass recomputes the weights from
the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends import vjp
from attnlab.attention.backends.reference import MASK_VALUE, stop_masked_gradient
from attnlab.attention.backends.registry import (
    AttentionResult,
    apply_sinks,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import BlockMask, StaticBlockInfo, even_block_size, make_block_mask
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
    offset: BlockOffset = (0, 0, 0, 0),
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Return output and log-sum-exp as `reference` does, without holding all scores at once.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: the pairs that may attend. None allows every pair.
      score: modifies the scaled scores.
      scale: factor of the scores.
      offset: indices of the first batch row, head, query and key, if the arrays are a shard.
      block_sizes: block_q and block_kv, `default_block_sizes` by default.
    """
    if query.dtype == jnp.float32 or not isinstance(scale, float):
        query, scale = query * scale, 1.0  # scales T x D numbers instead of T x S
    inputs = _BlockedInputs(query.shape, key.shape, mask, score, scale, offset, block_sizes)
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    out, lse = _blockwise(inputs.static, *arrays, *inputs.values)
    return inputs.ungroup_heads(out), inputs.ungroup_heads(lse)


def blockwise_gradients(
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
    offset: BlockOffset = (0, 0, 0, 0),
):
    """Return gradients of attention to a subset of the keys, given the log-sum-exp of all keys.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      d_out: gradient of the output, (B, T, H, Dv).
      lse: log-sum-exp over all keys, including those that are not in `key`, (B, T, H).
      delta: `vjp.row_term` of the output over all keys, (B, T, H).
      mask: as in `blockwise`.
      score: as in `blockwise`.
      scale: as in `blockwise`.
      offset: as in `blockwise`.

    Returns:
      The gradients of query, key and value, in float32, and of the score. Those of query and score
      are the contributions of these keys.
    """
    inputs = _BlockedInputs(query.shape, key.shape, mask, score, scale, offset)
    rows = (inputs.group_heads(x) for x in (d_out, lse, delta))
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    d_query, d_key, d_value, d_score = _backward_blocks(inputs.static, *arrays, *inputs.values, *rows)
    s = key.shape[1]
    d_key, d_value = (jnp.swapaxes(x, 1, 2)[:, :s] for x in (d_key, d_value))
    return inputs.ungroup_heads(d_query), d_key, d_value, vjp.finalize(score, d_score)


def blockwise_autodiff(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    offset: BlockOffset = (0, 0, 0, 0),
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Return the result of `blockwise` in a form that JAX differentiates automatically.

    It is slower than `blockwise` but has forward-mode and second derivatives. The arguments are
    those of `blockwise`.
    """
    inputs = _BlockedInputs(query.shape, key.shape, mask, score, scale, offset, block_sizes, unroll=False)
    query, key, value = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    blocks = _Blocks(inputs.static, *inputs.values)
    kv_indices, num_full, num_blocks = (jnp.asarray(x) for x in blocks.block_mask)

    def queries(_, i):
        visit = _online_softmax(blocks, _slice(query, i, blocks.block_q, 3), key, value, i)

        @jax.checkpoint
        def step(carry, n):
            branch = jnp.where(n < num_full[i], 1, jnp.where(n < num_blocks[i], 2, 0))
            branches = [
                lambda c: c,
                lambda c: visit(c, kv_indices[i, n], False),
                lambda c: visit(c, kv_indices[i, n], True),
            ]
            return jax.lax.switch(branch, branches, carry), None

        carry, _ = jax.lax.scan(step, _init_state(blocks, query, value), jnp.arange(kv_indices.shape[1]))
        return None, _finalize(carry, value.dtype)

    _, (out, lse) = blocks.map_q_blocks(queries, None)
    return inputs.ungroup_heads(out), inputs.ungroup_heads(lse)


class _BlockedInputs:
    """Padding and layout of one call, with heads as a batch dimension of all matrix products."""

    def __init__(self, query_shape, key_shape, mask, score, scale, offset, block_sizes=None, unroll=True):
        b, t, self.heads, _ = query_shape
        s, self.kv_heads = key_shape[1:3]
        block_q, block_kv = block_sizes or default_block_sizes(t, s)
        grid = BlockGrid(t, s, block_q, block_kv, b, self.heads, offset)
        block_mask, static_info = make_block_mask(mask, grid)
        if not unroll:
            static_info = StaticBlockInfo()
        self.num_queries, count, width = t, *grid.num_blocks
        self.lengths = {"queries": count * block_q, "keys": width * block_kv}
        mask, score = (x if x is None else x.pad_to(**self.lengths) for x in (mask, score))
        self.static = block_q, block_kv, s, static_info, scale
        self.values = mask, score, block_mask, offset

    def group_heads(self, x):
        """Return (B, T, H, ...) as (B, K, G, T', ...), G = H / K and T' padded to blocks."""
        x = _pad(x, self.lengths["queries"])
        x = x.reshape(*x.shape[:2], self.kv_heads, self.heads // self.kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def heads_first(self, x):
        """Return (B, S, K, D) as (B, K, S', D), S' padded to blocks."""
        return jnp.swapaxes(_pad(x, self.lengths["keys"]), 1, 2)

    def ungroup_heads(self, x):
        """Return (B, K, G, T', ...) as (B, T, H, ...)."""
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(*x.shape[:2], self.heads, *x.shape[4:])[:, : self.num_queries]


def default_block_sizes(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Return block_q and block_kv.

    These sizes were the fastest on CPUs, where the scores of a block should fit into the cache.
    Short sequences have smaller blocks, since a causal mask then skips a larger fraction of them.
    """
    if num_queries <= 1024 and num_keys <= 1024:
        q, kv = (even_block_size(n, min(128, max(64, -(-n // 4)))) for n in (num_queries, num_keys))
        return q, kv
    return even_block_size(num_queries, 256), even_block_size(num_keys, 512)


def _pad(x: Array, length: int) -> Array:
    padding = length - x.shape[1]
    return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)]) if padding else x


def _slice(x: Array, i, size: int, axis: int) -> Array:
    """Return the i-th slice of `size` elements along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


class _Blocks:
    """The blocks of one call: their scores, and loops over the blocks of the block mask."""

    def __init__(
        self, static, mask: Mask | None, score: Score | None, block_mask: BlockMask, offset: BlockOffset
    ):
        self.block_q, self.block_kv, self.num_keys, self.static_info, self.scale = static
        self.mask, self.score, self.block_mask, self.offset = mask, score, block_mask, offset

    def _pair_indices(self, i, j, batch: int, heads: int):
        b, h, q, k = self.offset
        offset = b, h, q + i * self.block_q, k + j * self.block_kv
        return block_indices(offset, (batch, heads, self.block_q, self.block_kv))

    def slice_values(self, value, i, j):
        """Return a mask or score with its arrays sliced to a block."""
        return value.slice_block(
            queries=(i * self.block_q, self.block_q), keys=(j * self.block_kv, self.block_kv)
        )

    def scores(self, q, k, i, j, masked: bool):
        """Return the scores of a block and their VJP.

        The scores are (B, K, G, block_q, block_kv). The VJP returns the gradients of the products
        of queries and keys, and of the `Score`.
        """
        raw = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
        shape, flat = raw.shape, (raw.shape[0], raw.shape[1] * raw.shape[2], *raw.shape[3:])
        at = self._pair_indices(i, j, *flat[:2])
        allowed = self._allowed(at, i, j, flat) if masked else None
        scores, pull_back = self._scaled(raw), lambda g: (self._scaled(g), None)
        if self.score is not None:
            modified, score_vjp = jax.vjp(
                lambda x, score: score(stop_masked_gradient(allowed, x), at),
                scores.reshape(flat),
                self.slice_values(self.score, i, j),
            )
            scores = modified.reshape(shape)

            def pull_back(g):
                g, g_score = score_vjp(g.reshape(flat))
                return self._scaled(g.reshape(shape)), g_score

        if allowed is not None:
            grouped = (1, 1) if allowed.shape[1] == 1 else shape[1:3]
            scores = jnp.where(allowed.reshape(-1, *grouped, *shape[3:]), scores, MASK_VALUE)
        return scores, pull_back

    def _allowed(self, at, i, j, shape):
        """Return the allowed pairs of a block, (B or 1, H or 1, block_q, block_kv)."""
        local = j * self.block_kv + jnp.arange(self.block_kv)
        allowed = (local < self.num_keys)[None, None, None, :]
        if self.mask is not None:
            allowed = allowed & self.slice_values(self.mask, i, j).evaluate(at)
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], *shape[2:]))

    def _scaled(self, x):
        return x if self.scale == 1 else self.scale * x

    def loop_kv_blocks(self, step, carry, i):
        """Fold `step(carry, j, masked)` over the kv blocks of query block i."""
        if self.static_info.unrolled is not None:
            for j, masked in self.static_info.unrolled[i]:
                carry = step(carry, j, masked)
            return carry
        kv_indices, num_full, num_blocks = (jnp.asarray(x)[i] for x in self.block_mask)
        if self.static_info.has_full:
            carry = jax.lax.fori_loop(0, num_full, lambda n, c: step(c, kv_indices[n], False), carry)
        if self.static_info.has_partial:
            carry = jax.lax.fori_loop(num_full, num_blocks, lambda n, c: step(c, kv_indices[n], True), carry)
        return carry

    def map_q_blocks(self, step, carry):
        """Scan `step(carry, i)` over the query blocks; concatenate its outputs along them."""
        count = len(self.block_mask.full_kv_num_blocks)
        if self.static_info.unrolled is not None:
            results = []
            for i in range(count):
                carry, result = step(carry, i)
                results.append(result)
            return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)
        carry, parts = jax.lax.scan(step, carry, jnp.arange(count))

        def join(x):
            x = jnp.moveaxis(x, 0, 3)
            return x.reshape(*x.shape[:3], count * self.block_q, *x.shape[5:])

        return carry, jax.tree.map(join, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static, query, key, value, mask, score, block_mask, offset):
    return _forward(static, query, key, value, mask, score, block_mask, offset)[0]


def _forward(static, query, key, value, mask, score, block_mask, offset):
    blocks = _Blocks(static, mask, score, block_mask, offset)

    def queries(_, i):
        step = _online_softmax(blocks, _slice(query, i, blocks.block_q, 3), key, value, i)
        return None, _finalize(blocks.loop_kv_blocks(step, _init_state(blocks, query, value), i), value.dtype)

    _, (out, lse) = blocks.map_q_blocks(queries, None)
    return (out, lse), (query, key, value, mask, score, block_mask, offset, out, lse)


def _online_softmax(blocks: _Blocks, q, key, value, i):
    """Return the function that adds a kv block to the running softmax of query block i."""

    def step(carry, j, masked):
        row_max, row_sum, out = carry
        k, v = (_slice(x, j, blocks.block_kv, 2) for x in (key, value))
        scores, _ = blocks.scores(q, k, i, j, masked)
        # The result does not depend on the maximum, nor do its derivatives.
        new_max = jax.lax.stop_gradient(jnp.maximum(row_max, scores.max(axis=-1)))
        weights, rescale = jnp.exp(scores - new_max[..., None]), jnp.exp(row_max - new_max)
        update = jnp.einsum(
            "bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return new_max, row_sum * rescale + weights.sum(axis=-1), out * rescale[..., None] + update

    return step


def _init_state(blocks: _Blocks, query, value):
    row = (*query.shape[:3], blocks.block_q)
    return jnp.full(row, MASK_VALUE), jnp.zeros(row), jnp.zeros((*row, value.shape[-1]))


def _finalize(carry, dtype):
    """Return output and log-sum-exp of rows after their last kv block."""
    row_max, row_sum, out = carry
    empty = row_max <= MASK_VALUE
    row_sum = jnp.where(empty, 1, row_sum)
    out = jnp.where(empty[..., None], 0, out / row_sum[..., None])
    return out.astype(dtype), jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))


def _backward(static, residuals, d_outputs):
    query, key, value, mask, score, block_mask, offset, out, lse = residuals
    d_out, d_lse = d_outputs
    delta = vjp.row_term(out, d_out, d_lse)
    arrays = query, key, value
    *grads, d_score = _backward_blocks(static, *arrays, mask, score, block_mask, offset, d_out, lse, delta)
    grads = [g.astype(x.dtype) for x, g in zip(arrays, grads, strict=True)]
    d_score = vjp.finalize(score, d_score)
    d_mask, d_block_mask, d_offset = (vjp.zero_cotangent(x) for x in (mask, block_mask, offset))
    return *grads, d_mask, d_score, d_block_mask, d_offset


def _backward_blocks(static, query, key, value, mask, score, block_mask, offset, d_out, lse, delta):
    blocks = _Blocks(static, mask, score, block_mask, offset)
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    # Gradients of keys and values are accumulated as (B, K, D, S). A product with a block of scores
    # on the right is twice as fast on CPUs as one with its transpose.
    width_first = [jnp.moveaxis(x, -1, 2) for x in (query, d_out)]

    def queries(sums, i):
        q, d_out_i, delta_i, lse_i = (
            _slice(x, i, blocks.block_q, 3) for x in (query, d_out, delta, finite_lse)
        )
        q_width_first, d_out_width_first = (_slice(x, i, blocks.block_q, 4) for x in width_first)

        def step(carry, j, masked):
            d_q, (d_key, d_value, d_score) = carry
            k, v = (_slice(x, j, blocks.block_kv, 2) for x in (key, value))
            scores, pull_back = blocks.scores(q, k, i, j, masked)
            weights = jnp.exp(scores - lse_i[..., None])
            d_weights = jnp.einsum("bkgtd,bksd->bkgts", d_out_i, v, preferred_element_type=jnp.float32)
            d_scores, d_score_block = pull_back(weights * (d_weights - delta_i[..., None]))
            d_scores = d_scores.astype(q.dtype)
            d_k = _sum_over_queries(q_width_first, d_scores)
            d_v = _sum_over_queries(d_out_width_first, weights.astype(d_out.dtype))
            d_q += jnp.einsum("bkgts,bksd->bkgtd", d_scores, k, preferred_element_type=jnp.float32)
            sums = (
                _add_at(d_key, d_k, j * blocks.block_kv, 3),
                _add_at(d_value, d_v, j * blocks.block_kv, 3),
                vjp.accumulate_block(
                    score, d_score, d_score_block, queries=i * blocks.block_q, keys=j * blocks.block_kv
                ),
            )
            return d_q, sums

        d_q, sums = blocks.loop_kv_blocks(step, (jnp.zeros(q.shape), sums), i)
        return sums, d_q

    zeros = [jnp.zeros(jnp.swapaxes(x, 2, 3).shape) for x in (key, value)]
    (d_key, d_value, d_score), d_query = blocks.map_q_blocks(queries, (*zeros, vjp.init(score)))
    return d_query, jnp.swapaxes(d_key, 2, 3), jnp.swapaxes(d_value, 2, 3), d_score


def _sum_over_queries(rows: Array, block: Array) -> Array:
    """Contract rows (B, K, D, G, T) with a block (B, K, G, T, S) to (B, K, D, S)."""
    return jnp.einsum("bkdgt,bkgts->bkds", rows, block, preferred_element_type=jnp.float32)


def _add_at(total: Array, part: Array, start, axis: int) -> Array:
    """Return `total` with `part` added at `start` along an axis."""
    current = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, current + part, start, axis)


_blockwise.defvjp(_forward, _backward)


class Blockwise:
    """Any mask and score, in memory linear in the length; see `blockwise`."""

    name = "blockwise"
    function = staticmethod(blockwise)

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        return softmax_only_reason(args) or sharded_length_reason(args)

    def run(self, args, offset):
        """See `Backend.run`."""
        out, lse = self.function(
            args.query,
            args.key,
            args.value,
            mask=args.mask,
            score=args.score,
            scale=args.scale,
            offset=offset,
        )
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


class BlockwiseAutodiff(Blockwise):
    """`Blockwise` with forward-mode and second derivatives; see `blockwise_autodiff`."""

    name = "blockwise_autodiff"
    function = staticmethod(blockwise_autodiff)
