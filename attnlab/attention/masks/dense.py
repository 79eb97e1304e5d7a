"""Masks and additive scores as dense arrays, for backends that accept nothing else."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.blocks import BlockOffset
from attnlab.attention.masks.normal_form import depends_on_batch_and_heads
from attnlab.attention.pairwise import block_indices
from attnlab.attention.scores import Score

GIB = 2**30
Shape = tuple[int, int, int, int]  # of the scores, (B, H, T, S)


def materialize_mask(mask: Mask, shape: Shape, offset: BlockOffset) -> Bool[Array, "B H T S"]:
    """Return the allowed pairs; batch and heads are 1 where the mask does not depend on them."""
    allowed = mask.evaluate(block_indices(offset, shape))
    return jnp.broadcast_to(allowed, (*allowed.shape[:2], *shape[2:]))


def materialize_bias(score: Score | None, shape: Shape, offset: BlockOffset) -> Float[Array, "B H T S"]:
    """Return the bias that a score with `is_additive` adds; zeros if `score` is None."""
    zeros = jnp.zeros(shape)
    return zeros if score is None else score(zeros, block_indices(offset, shape))


def mask_size(mask: Mask, shape: Shape) -> int:
    """Return the number of elements of `materialize_mask`."""
    by_row, by_head = depends_on_batch_and_heads(mask)
    b, h, t, s = shape
    return (b if by_row else 1) * (h if by_head else 1) * t * s


def format_bytes(size: int) -> str:
    """Return a number of bytes, formatted in GiB."""
    return f"{size / GIB:.1f} GiB"
