"""Blockwise attention in plain JAX: memory linear in the length, empty blocks skipped.

Full blocks are not masked. If the mask differs between batch rows, or heads, each of them visits
its own blocks, one row after the other. The forward pass keeps a running maximum and sum of each
row (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3). The backward pass recomputes the
weights from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.arrays import cast_varying, named_output, slice_at, unify_varying, varying_axes, wide
from attnlab.attention.backends import vjp
from attnlab.attention.backends.reference import MASK_VALUE, stop_masked_gradient
from attnlab.attention.backends.registry import (
    AttentionResult,
    apply_sinks,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import MAX_STEP_SCORES, BlockMask, default_block_sizes, make_block_mask
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import padding_is_all, zero_padding
from attnlab.attention.pairwise import BlockGrid, BlockOffset, block_indices
from attnlab.attention.scores import Score


def blockwise(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float = 1.0,
    dropout: AttentionDropout | None = None,
    offset: BlockOffset = (0, 0, 0, 0),
    block_sizes: tuple[int, int] | None = None,
    block_mask: BlockMask | None = None,
    max_step_scores: int | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Return output and log-sum-exp as `reference` does, without holding all scores at once.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: the pairs that may attend. None allows every pair.
      score: modifies the scaled scores.
      scale: factor of the scores.
      dropout: drops weights after the softmax. None for no dropout.
      offset: indices of the first batch row, head, query and key, if the arrays are a shard.
      block_sizes: block_q and block_kv, `default_block_sizes` by default.
      block_mask: the blocks of the mask, if they are known; their sizes replace `block_sizes`.
      max_step_scores: a step that computes one batch row has so few of its heads that it has at
        most this number of scores. None, and larger blocks, compute all heads.
    """
    if query.dtype == jnp.float32 or not isinstance(scale, float):
        query, scale = query * scale, 1.0  # scales T x D numbers instead of T x S
    # Zeros in padding cost less than zeros in each block, which other masks need.
    clean = padding_is_all(mask, offset, query.shape[1], key.shape[1])
    if clean:
        query, key, value = zero_padding(mask, query, key, value)
    values = mask, score, dropout
    options = {"clean": clean, "max_step_scores": max_step_scores}
    inputs = BlockedInputs(query.shape, key.shape, values, scale, offset, block_sizes, block_mask, **options)
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    out, lse = _blockwise(inputs.static, *unify_varying((*arrays, *inputs.values)))
    return inputs.ungroup_heads(out), inputs.ungroup_heads(lse)


class QueryBlock(NamedTuple):
    """The block of queries of one step: its first batch row and query head, and its index.

    The first two are 0 if a step computes all rows, or all heads.
    """

    row: Array | int
    head: Array | int
    block: Array | int


class Blocks:
    """The blocks of one call: their scores, and loops over the blocks of the block mask.

    A step computes the rows and heads that share their lists of blocks, or some of these heads.
    """

    def __init__(
        self,
        static,
        query_shape: tuple[int, ...],
        mask: Mask | None,
        score: Score | None,
        dropout: AttentionDropout | None,
        block_mask: BlockMask,
        offset: BlockOffset,
    ):
        self.scale, self.clean, max_step_scores = static
        self.mask, self.score, self.dropout = mask, score, dropout
        self.block_mask, self.offset = block_mask, offset
        self.block_q, self.block_kv, self.info = block_mask.block_q, block_mask.block_kv, block_mask.info
        self.shape = query_shape[:3]  # (B, K, G)
        b, kv_heads, group = self.shape
        num_rows, num_heads = block_mask.num_lists
        self.list_heads = heads = kv_heads * group // num_heads
        fit = min((max_step_scores or 0) // (self.block_q * self.block_kv), heads)
        if fit and b == num_rows and self.info.unrolled is None:
            # Whole groups of a key head, or an equal part of one.
            heads = max(n for n in range(1, fit + 1) if heads % n == 0 and 0 in (n % group, group % n))
        # (B, K, G) of one step
        self.step_shape = b // num_rows, *((heads // group, group) if heads >= group else (1, heads))
        self.num_steps = num_rows, kv_heads * group // heads

    def _pair_indices(self, at: QueryBlock, j):
        b, h, q, k = self.offset
        offset = b + at.row, h + at.head, q + at.block * self.block_q, k + j * self.block_kv
        rows, *heads = self.step_shape
        return block_indices(offset, (rows, math.prod(heads), self.block_q, self.block_kv))

    def starts(self, at: QueryBlock, j) -> dict[str, Array | int]:
        """Return the start of a block in the arrays of a mask or score, per named dimension."""
        starts: dict[str, Array | int] = {"queries": at.block * self.block_q, "keys": j * self.block_kv}
        firsts = {"batch": at.row, "heads": at.head}
        steps = zip(firsts, self.num_steps, strict=True)
        return starts | {name: firsts[name] for name, count in steps if count > 1}

    def slice_values(self, value, at: QueryBlock, j):
        """Return a mask, score or dropout with its arrays sliced to a block."""
        rows, *heads = self.step_shape
        sizes = {"queries": self.block_q, "keys": self.block_kv, "batch": rows, "heads": math.prod(heads)}
        return value.slice_block(**{name: (x, sizes[name]) for name, x in self.starts(at, j).items()})

    def slice_queries(self, x: Array, at: QueryBlock, axis: int = 3) -> Array:
        """Return a block of an array of queries (B, K, G, T, ...), or (B, K, D, G, T) at axis 4."""
        group, group_axis = self.shape[2], axis - 1
        starts: list[Array | int] = [0] * x.ndim
        sizes = list(x.shape)
        starts[:2], starts[group_axis] = [at.row, at.head // group], at.head % group
        sizes[:2], sizes[group_axis] = self.step_shape[:2], self.step_shape[2]
        starts[axis], sizes[axis] = at.block * self.block_q, self.block_q
        return slice_at(x, starts, sizes)

    def key_starts(self, at: QueryBlock, j, axis: int) -> list[Array | int]:
        """Return the start of a block in an array of keys (B, K, ...) with its length on `axis`."""
        starts = [at.row, at.head // self.shape[2], 0, 0]
        starts[axis] = j * self.block_kv
        return starts

    def slice_keys(self, x: Array, at: QueryBlock, j) -> Array:
        """Return the block of an array of keys (B, K, S, D)."""
        sizes = *self.step_shape[:2], self.block_kv, x.shape[3]
        return slice_at(x, self.key_starts(at, j, 2), sizes)

    def allowed_pairs(self, at: QueryBlock, j):
        """Return the allowed pairs of a block, (B or 1, K or 1, G or 1, block_q, block_kv)."""
        local = j * self.block_kv + jnp.arange(self.block_kv)
        allowed = (local < self.block_mask.kv_length)[None, None, None, :]
        if self.mask is not None:
            pairs = self._pair_indices(at, j)
            allowed = allowed & self.slice_values(self.mask, at, j).evaluate(pairs)
        heads = (1, 1) if allowed.shape[1] == 1 else self.step_shape[1:]
        allowed = allowed.reshape(-1, *heads, *allowed.shape[2:])
        return jnp.broadcast_to(allowed, (*allowed.shape[:3], self.block_q, self.block_kv))

    def zero_masked_keys(self, allowed, *arrays):
        """Return keys or values with 0 for those without queries; see `zero_masked`."""
        if allowed is None or self.clean:
            return arrays
        return tuple(jnp.where(allowed.any((2, 3))[..., None], x, 0) for x in arrays)

    def scores(self, q, k, at: QueryBlock, j, allowed):
        """Return the scores of a block and their VJP.

        The scores are (B, K, G, block_q, block_kv). The VJP returns the gradients of the products
        of queries and keys, and of the `Score`. `allowed` is from `allowed_pairs`, or None.
        """
        raw = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=wide(q))
        shape, flat = raw.shape, (raw.shape[0], raw.shape[1] * raw.shape[2], *raw.shape[3:])
        scores, pull_back = self._scaled(raw), lambda g: (self._scaled(g), None)
        if self.score is not None:
            pairs = self._pair_indices(at, j)
            allowed_4d = None if allowed is None else allowed.reshape(len(allowed), -1, *flat[2:])
            modified, score_vjp = jax.vjp(
                lambda x, score: score(stop_masked_gradient(allowed_4d, x), pairs),
                scores.reshape(flat),
                self.slice_values(self.score, at, j),
            )
            scores = modified.reshape(shape)

            def pull_back(g):
                g, g_score = score_vjp(g.reshape(flat).astype(modified.dtype))
                return self._scaled(g.reshape(shape)), g_score

        return scores if allowed is None else jnp.where(allowed, scores, MASK_VALUE), pull_back

    def drop(self, weights, at: QueryBlock, j):
        """Return the weights of a block, or their gradients, after dropout."""
        if self.dropout is None:
            return weights
        flat = weights.reshape(len(weights), -1, *weights.shape[3:])
        kept = self.slice_values(self.dropout, at, j)(flat, self._pair_indices(at, j))
        return kept.reshape(weights.shape)

    def _scaled(self, x):
        return x if self.scale == 1 else self.scale * x

    def kv_lists(self, at: QueryBlock):
        """Return the full kv blocks of a block of queries, their number, and the partial ones."""
        index, mask = (at.row // self.step_shape[0], at.head // self.list_heads, at.block), self.block_mask
        lists = mask.full_kv_indices, mask.full_kv_num_blocks, mask.kv_indices, mask.kv_num_blocks
        return tuple(jnp.asarray(x)[index] for x in lists)

    def loop_kv_blocks(self, step, carry, at: QueryBlock):
        """Fold `step(carry, j, masked)` over the kv blocks of a block of queries."""
        if self.info.unrolled is not None:
            for j, masked in self.info.unrolled[at.block]:
                carry = step(carry, j, masked)
            return carry
        full, num_full, partial_, num_partial = self.kv_lists(at)
        if self.info.has_full:
            carry = jax.lax.fori_loop(0, num_full, lambda n, c: step(c, full[n], False), carry)
        if self.info.has_partial:
            carry = jax.lax.fori_loop(0, num_partial, lambda n, c: step(c, partial_[n], True), carry)
        return carry

    def map_q_blocks(self, step, carry):
        """Scan `step(carry, at)` over blocks of queries; return its outputs (B, K, G, T, ...)."""
        count = self.block_mask.num_blocks[0]
        if self.info.unrolled is not None:
            results = []
            for i in range(count):
                carry, result = step(carry, QueryBlock(0, 0, i))
                results.append(result)
            return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)
        rows, heads = self.num_steps
        indices = np.indices((rows, heads, count)).reshape(3, -1).T
        step_rows, *step_heads = self.step_shape
        firsts = indices * np.array([step_rows, math.prod(step_heads), 1])
        carry, parts = jax.lax.scan(lambda c, at: step(c, QueryBlock(*at)), carry, jnp.asarray(firsts))
        kv_heads, group = (n // m for n, m in zip(self.shape[1:], step_heads, strict=True))

        def join(x):
            # (rows, kv heads, heads of a group, blocks of queries) of the steps, then of one step
            x = x.reshape(rows, kv_heads, group, count, *x.shape[1:])
            x = x.transpose(0, 4, 1, 5, 2, 6, 3, *range(7, x.ndim))
            return x.reshape(*self.shape, count * self.block_q, *x.shape[8:])

        return carry, jax.tree.map(join, parts)


class BlockedInputs:
    """Padding and layout of one call, with heads as a batch dimension of all matrix products."""

    def __init__(
        self,
        query_shape,
        key_shape,
        values,
        scale,
        offset,
        block_sizes=None,
        block_mask=None,
        clean=False,
        max_step_scores=None,
    ):
        b, t, self.heads, _ = query_shape
        s, self.kv_heads = key_shape[1:3]
        mask, *_ = values
        if block_mask is None:
            block_sizes = block_sizes or default_block_sizes(t, s, mask)
            block_mask = make_block_mask(mask, BlockGrid(t, s, *block_sizes, b, self.heads, offset))
        self.num_queries, (count, width) = t, block_mask.num_blocks
        self.lengths = {"queries": count * block_mask.block_q, "keys": width * block_mask.block_kv}
        self.static = scale, clean or mask is None, max_step_scores
        values = (x if x is None else x.pad_to(**self.lengths) for x in values)
        self.values = *values, block_mask, offset

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


def _pad(x: Array, length: int) -> Array:
    padding = length - x.shape[1]
    return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)]) if padding else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static, query, key, value, *values):
    return _forward(static, query, key, value, *values)[0]


def _forward(static, query, key, value, *values):
    blocks = Blocks(static, query.shape, *values)

    def queries(_, at):
        q = blocks.slice_queries(query, at)
        step = online_softmax(blocks, q, key, value, at)
        return None, finalize(blocks.loop_kv_blocks(step, init_state(q, value), at), value.dtype)

    out, lse = named_output(*blocks.map_q_blocks(queries, None)[1])
    return (out, lse), (query, key, value, values, out, lse)


def online_softmax(blocks: Blocks, query, key, value, at: QueryBlock, zero_all: bool = False):
    """Return the function that adds a kv block to the running softmax of a block of queries."""

    def step(carry, j, masked):
        row_max, row_sum, out = carry
        q, k, v = query, *(blocks.slice_keys(x, at, j) for x in (key, value))
        allowed = blocks.allowed_pairs(at, j) if masked else None
        if zero_all and masked:  # only gradients by JAX need this
            q, (k,) = jnp.where(allowed.any(-1)[..., None], q, 0), blocks.zero_masked_keys(allowed, k)
        (v,) = blocks.zero_masked_keys(allowed, v)
        scores, _ = blocks.scores(q, k, at, j, allowed)
        # The result does not depend on the maximum, nor do its derivatives.
        new_max = jax.lax.stop_gradient(jnp.maximum(row_max, scores.max(axis=-1)))
        weights, rescale = jnp.exp(scores - new_max[..., None]), jnp.exp(row_max - new_max)
        kept = blocks.drop(weights, at, j).astype(v.dtype)
        update = jnp.einsum("bkgts,bksd->bkgtd", kept, v, preferred_element_type=wide(v))
        return new_max, row_sum * rescale + weights.sum(axis=-1), out * rescale[..., None] + update

    return step


def init_state(query, value):
    """Return the state of the running softmax before the first kv block."""
    row = query.shape[:4]
    state = jnp.full(row, MASK_VALUE), jnp.zeros(row), jnp.zeros((*row, value.shape[-1]))
    return cast_varying(state, varying_axes(query))


def finalize(carry, dtype):
    """Return output and log-sum-exp of rows after their last kv block."""
    row_max, row_sum, out = carry
    empty = row_max <= MASK_VALUE
    row_sum = jnp.where(empty, 1, row_sum)
    out = jnp.where(empty[..., None], 0, out / row_sum[..., None])
    return out.astype(dtype), jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))


def _backward(static, residuals, d_outputs):
    *arrays, values, out, lse = residuals
    (d_out, d_lse), (mask, score, *others) = d_outputs, values
    delta = vjp.row_term(out, d_out, d_lse)
    *grads, d_score = backward_blocks(static, *arrays, values, d_out, lse, delta)
    grads = [g.astype(x.dtype) for x, g in zip(arrays, grads, strict=True)]
    return *grads, vjp.zero_cotangent(mask), vjp.finalize(score, d_score), *map(vjp.zero_cotangent, others)


def backward_blocks(static, query, key, value, values, d_out, lse, delta):
    """Return gradients of query, key and value, and of the score's blocks; see `BlockedInputs`."""
    blocks, score = Blocks(static, query.shape, *values), values[1]
    axes = varying_axes((query, key, value, d_out))
    empty = jnp.isneginf(lse)
    lse = jnp.where(empty, 0, lse)
    if not blocks.clean:  # rows without keys have weights 0, and 0 * NaN would be NaN
        query, d_out = (jnp.where(empty[..., None], 0, x) for x in (query, d_out))
        delta = jnp.where(empty, 0, delta)
    # Gradients of keys and values are accumulated as (B, K, D, S). A product with a block of scores
    # on the right is twice as fast on CPUs as one with its transpose.
    width_first = [jnp.moveaxis(x, -1, 2) for x in (query, d_out)]

    def queries(sums, at):
        q, d_out_i, delta_i, lse_i = (blocks.slice_queries(x, at) for x in (query, d_out, delta, lse))
        q_width_first, d_out_width_first = (blocks.slice_queries(x, at, 4) for x in width_first)

        def step(carry, j, masked):
            d_q, (d_key, d_value, d_score) = carry
            k, v = (blocks.slice_keys(x, at, j) for x in (key, value))
            allowed = blocks.allowed_pairs(at, j) if masked else None
            k, v = blocks.zero_masked_keys(allowed, k, v)
            scores, pull_back = blocks.scores(q, k, at, j, allowed)
            weights = jnp.exp(scores - lse_i[..., None])
            d_kept = jnp.einsum("bkgtd,bksd->bkgts", d_out_i, v, preferred_element_type=wide(v))
            d_weights = blocks.drop(d_kept, at, j)
            d_scores, d_score_block = pull_back(weights * (d_weights - delta_i[..., None]))
            d_scores = d_scores.astype(q.dtype)
            d_k = _sum_over_queries(q_width_first, d_scores)
            d_v = _sum_over_queries(d_out_width_first, blocks.drop(weights, at, j).astype(d_out.dtype))
            d_q += jnp.einsum("bkgts,bksd->bkgtd", d_scores, k, preferred_element_type=wide(k))
            sums = (
                vjp.add_at(d_key, d_k, blocks.key_starts(at, j, 3)),
                vjp.add_at(d_value, d_v, blocks.key_starts(at, j, 3)),
                vjp.accumulate_block(score, d_score, d_score_block, **blocks.starts(at, j)),
            )
            return d_q, sums

        d_q, sums = blocks.loop_kv_blocks(step, (cast_varying(jnp.zeros(q.shape), axes), sums), at)
        return sums, d_q

    zeros = [jnp.zeros(jnp.swapaxes(x, 2, 3).shape) for x in (key, value)]
    sums = cast_varying((*zeros, vjp.init(score)), axes)
    (d_key, d_value, d_score), d_query = blocks.map_q_blocks(queries, sums)
    # XLA for CPUs with bfloat16 can merge a product with its transpose, but not compute the result.
    d_key, d_value = jax.lax.optimization_barrier((d_key, d_value))
    return d_query, jnp.swapaxes(d_key, 2, 3), jnp.swapaxes(d_value, 2, 3), d_score


def _sum_over_queries(rows: Array, block: Array) -> Array:
    """Contract rows (B, K, D, G, T) with a block (B, K, G, T, S) to (B, K, D, S)."""
    return jnp.einsum("bkdgt,bkgts->bkds", rows, block, preferred_element_type=wide(rows))


_blockwise.defvjp(_forward, _backward)


class Blockwise:
    """Any mask and score, in memory linear in the length; see `blockwise`."""

    name = "blockwise"
    function = staticmethod(blockwise)

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        return softmax_only_reason(args, dropout=True) or sharded_length_reason(args)

    def block_sizes(self, args):
        """See `Backend`."""
        b, h, t, s = args.score_shape
        return default_block_sizes(t, s, args.mask, args.platform, b * h)

    def run(self, args, offset):
        """See `Backend.run`."""
        options = {"mask": args.mask, "score": args.score, "scale": args.scale, "offset": offset}
        options |= {"dropout": args.dropout, "block_mask": args.block_mask}
        options["max_step_scores"] = MAX_STEP_SCORES if args.platform == "cpu" else None
        if args.block_mask is None:
            options["block_sizes"] = self.block_sizes(args)
        out, lse = self.function(args.query, args.key, args.value, **options)
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))
