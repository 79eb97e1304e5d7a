"""Blockwise attention in a form that JAX differentiates automatically."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import named_output, unify_varying
from attnlab.attention.backends.blockwise import (
    BlockedInputs,
    Blocks,
    Blockwise,
    finalize,
    init_state,
    online_softmax,
)
from attnlab.attention.block_mask import BlockMask, StaticBlockInfo
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.pairwise import BlockOffset
from attnlab.attention.scores import Score


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
    max_step_scores: int | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Return the result of `blockwise` in a form that JAX differentiates automatically.

    It is slower than `blockwise` but has forward-mode and second derivatives. The arguments are
    those of `blockwise`.
    """
    values = mask, score, dropout
    options = {"max_step_scores": max_step_scores}
    inputs = BlockedInputs(query.shape, key.shape, values, scale, offset, block_sizes, block_mask, **options)
    arrays = inputs.group_heads(query), inputs.heads_first(key), inputs.heads_first(value)
    query, key, value, mask, score, dropout, made, offset = unify_varying((*arrays, *inputs.values))
    made = dataclasses.replace(made, info=StaticBlockInfo())  # loops take their lists from arrays
    blocks = Blocks(inputs.static, query.shape, mask, score, dropout, made, offset)

    def queries(_, at):
        q = blocks.slice_queries(query, at)
        visit = online_softmax(blocks, q, key, value, at, zero_all=True)
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

        carry, _ = jax.lax.scan(step, init_state(q, value), jnp.arange(len(full)))
        return None, finalize(carry, value.dtype)

    out, lse = named_output(*blocks.map_q_blocks(queries, None)[1])
    return inputs.ungroup_heads(out), inputs.ungroup_heads(lse)


class BlockwiseAutodiff(Blockwise):
    """`Blockwise` with forward-mode and second derivatives; see `blockwise_autodiff`."""

    name = "blockwise_autodiff"
    function = staticmethod(blockwise_autodiff)
