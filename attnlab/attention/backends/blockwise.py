"""Blockwise attention in plain JAX: memory linear in the length, empty blocks skipped.

Full blocks are not masked. If the mask differs between batch rows, or heads, each of them visits
its own blocks, one row after the other. The forward pass keeps a running maximum and sum of each
row (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3). The backward pass recomputes the
weights from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import cast_varying, named_output, unify_varying, varying_axes, wide
from attnlab.attention.backends import vjp
from attnlab.attention.backends.block_loop import Blocks, QueryBlock
from attnlab.attention.backends.reference import MASK_VALUE
from attnlab.attention.backends.registry import (
    AttentionResult,
    apply_sinks,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import BlockMask, StaticBlockInfo, even_block_size, make_block_mask
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import normal_form, padding_is_all, zero_padding
from attnlab.attention.pairwise import BlockGrid, BlockOffset
from attnlab.attention.scores import Score

FEW_QUERIES, MAX_BLOCK_SCORES = 16, 2**26  # of blocks on a TPU or GPU


def default_block_sizes(
    num_queries: int, num_keys: int, mask: Mask | None = None, platform: str = "cpu", rows: int = 1
) -> tuple[int, int]:
    """Return block_q and block_kv; `rows` is the number of batch rows times heads.

    The sizes for CPUs were the fastest there: the scores of a block should fit into the cache, and
    a causal mask skips a larger fraction of smaller blocks. So do packed documents, which leave few
    pairs of a large block. On a GPU the launches of kernels limit
    small blocks: blocks have 1024 queries and keys, or less where the scores of a block, of all
    rows and heads, are over 2^26 (256 MiB). On a TPU or GPU, few queries take all keys at once.
    """
    if platform != "cpu" and num_queries <= FEW_QUERIES:
        return num_queries, even_block_size(num_keys, MAX_BLOCK_SCORES // (rows * num_queries) or 1)
    if platform == "gpu":
        size = 1024
        while size > 256 and rows * size**2 > MAX_BLOCK_SCORES:
            size //= 2
        return even_block_size(num_queries, size), even_block_size(num_keys, size)
    if num_queries <= 1024 and num_keys <= 1024:
        q, kv = (even_block_size(n, min(128, max(64, -(-n // 4)))) for n in (num_queries, num_keys))
        return q, kv
    max_q, max_kv = (128, 128) if normal_form(mask).segments is not None else (256, 512)
    return even_block_size(num_queries, max_q), even_block_size(num_keys, max_kv)


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
    """
    if query.dtype == jnp.float32 or not isinstance(scale, float):
        query, scale = query * scale, 1.0  # scales T x D numbers instead of T x S
    # Zeros in padding cost less than zeros in each block, which other masks need.
    clean = padding_is_all(mask, offset, query.shape[1], key.shape[1])
    if clean:
        query, key, value = zero_padding(mask, query, key, value)
    values = mask, score, dropout
    inputs = _BlockedInputs(query.shape, key.shape, values, scale, offset, block_sizes, block_mask, clean)
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    out, lse = _blockwise(inputs.static, *unify_varying((*arrays, *inputs.values)))
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
    dropout: AttentionDropout | None = None,
    offset: BlockOffset = (0, 0, 0, 0),
    block_mask: BlockMask | None = None,
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
      dropout: as in `blockwise`.
      offset: as in `blockwise`.
      block_mask: as in `blockwise`.

    Returns:
      The gradients of query, key and value, in float32, and of the score. Those of query and score
      are the contributions of these keys.
    """
    values = mask, score, dropout
    inputs = _BlockedInputs(query.shape, key.shape, values, scale, offset, block_mask=block_mask)
    rows = (inputs.group_heads(x) for x in (d_out, lse, delta))
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    d_query, d_key, d_value, d_score = _backward_blocks(inputs.static, *arrays, inputs.values, *rows)
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
    dropout: AttentionDropout | None = None,
    offset: BlockOffset = (0, 0, 0, 0),
    block_sizes: tuple[int, int] | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Return the result of `blockwise` in a form that JAX differentiates automatically.

    It is slower than `blockwise` but has forward-mode and second derivatives. The arguments are
    those of `blockwise`.
    """
    inputs = _BlockedInputs(
        query.shape, key.shape, (mask, score, dropout), scale, offset, block_sizes, block_mask, unroll=False
    )
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    query, key, value, *values = unify_varying((*arrays, *inputs.values))
    blocks = Blocks(inputs.static, query.shape, *values)

    def queries(_, at):
        q = blocks.slice_queries(query, at)
        visit = _online_softmax(blocks, q, key, value, at, zero_all=True)
        full, num_full, partial_, num_partial = blocks.kv_lists(at)

        @jax.checkpoint
        def step(carry, n):
            branch = jnp.where(n < num_full, 1, jnp.where(n < num_full + num_partial, 2, 0))
            branches = [
                lambda c: c,
                lambda c: visit(c, full[n], False),
                lambda c: visit(c, partial_[jnp.maximum(n - num_full, 0)], True),
            ]
            return jax.lax.switch(branch, branches, carry), None

        carry, _ = jax.lax.scan(step, _init_state(q, value), jnp.arange(len(full)))
        return None, _finalize(carry, value.dtype)

    out, lse = named_output(*blocks.map_q_blocks(queries, None)[1])
    return inputs.ungroup_heads(out), inputs.ungroup_heads(lse)


class _BlockedInputs:
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
        unroll=True,
    ):
        b, t, self.heads, _ = query_shape
        s, self.kv_heads = key_shape[1:3]
        mask, *_ = values
        if block_mask is None:
            block_sizes = block_sizes or default_block_sizes(t, s, mask)
            block_mask = make_block_mask(mask, BlockGrid(t, s, *block_sizes, b, self.heads, offset))
        if not unroll:
            block_mask = dataclasses.replace(block_mask, info=StaticBlockInfo())
        self.num_queries, (count, width) = t, block_mask.num_blocks
        self.lengths = {"queries": count * block_mask.block_q, "keys": width * block_mask.block_kv}
        self.static = scale, clean or mask is None
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
        step = _online_softmax(blocks, q, key, value, at)
        return None, _finalize(blocks.loop_kv_blocks(step, _init_state(q, value), at), value.dtype)

    out, lse = named_output(*blocks.map_q_blocks(queries, None)[1])
    return (out, lse), (query, key, value, values, out, lse)


def _online_softmax(blocks: Blocks, query, key, value, at: QueryBlock, zero_all: bool = False):
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


def _init_state(query, value):
    row = query.shape[:4]
    state = jnp.full(row, MASK_VALUE), jnp.zeros(row), jnp.zeros((*row, value.shape[-1]))
    return cast_varying(state, varying_axes(query))


def _finalize(carry, dtype):
    """Return output and log-sum-exp of rows after their last kv block."""
    row_max, row_sum, out = carry
    empty = row_max <= MASK_VALUE
    row_sum = jnp.where(empty, 1, row_sum)
    out = jnp.where(empty[..., None], 0, out / row_sum[..., None])
    return out.astype(dtype), jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))


def _backward(static, residuals, d_outputs):
    query, key, value, (mask, score, *others), out, lse = residuals
    d_out, d_lse = d_outputs
    delta = vjp.row_term(out, d_out, d_lse)
    arrays = query, key, value
    *grads, d_score = _backward_blocks(static, *arrays, (mask, score, *others), d_out, lse, delta)
    grads = [g.astype(x.dtype) for x, g in zip(arrays, grads, strict=True)]
    d_score = vjp.finalize(score, d_score)
    return *grads, vjp.zero_cotangent(mask), d_score, *map(vjp.zero_cotangent, others)


def _backward_blocks(static, query, key, value, values, d_out, lse, delta):
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
        if args.block_mask is None:
            options["block_sizes"] = self.block_sizes(args)
        out, lse = self.function(args.query, args.key, args.value, **options)
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


class BlockwiseAutodiff(Blockwise):
    """`Blockwise` with forward-mode and second derivatives; see `blockwise_autodiff`."""

    name = "blockwise_autodiff"
    function = staticmethod(blockwise_autodiff)
