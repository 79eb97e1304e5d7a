"""Masks and scores as one array each, for backends that take no other: what it is, and how large."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.block_mask import depends_on_batch_and_heads
from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.pairwise import block_indices

GIB = 2**30


def materialize_mask(mask: Mask, args: AttentionArgs, offset: BlockOffset) -> Bool[Array, "B H T S"]:
    """What a mask allows; dimensions of batch and heads that it does not depend on may be 1."""
    b, t, h, _ = args.query.shape
    s = args.key.shape[1]
    pairs = mask.evaluate(block_indices(offset, (b, h, t, s)))
    return jnp.broadcast_to(pairs, (*pairs.shape[:2], t, s))


def materialize_bias(args: AttentionArgs, offset: BlockOffset) -> Float[Array, "B H T S"]:
    """What a score that only adds (`Score.is_additive`) adds; 0 where there is none."""
    b, t, h, _ = args.query.shape
    nothing = jnp.zeros((b, h, t, args.key.shape[1]))
    return nothing if args.score is None else args.score(nothing, block_indices(offset, nothing.shape))


def mask_size(mask: Mask, args: AttentionArgs) -> int:
    """How many pairs `materialize_mask` has."""
    rows, heads = depends_on_batch_and_heads(mask)
    b, t, h, _ = args.query.shape
    return (b if rows else 1) * (h if heads else 1) * t * args.key.shape[1]


def bias_size(args: AttentionArgs) -> int:
    """How many pairs `materialize_bias` has."""
    b, t, h, _ = args.query.shape
    return b * h * t * args.key.shape[1]


def format_bytes(size: int) -> str:
    """So many bytes, as a refusal tells them."""
    return f"{size / GIB:.1f} GiB"
