"""Masks and additive scores as dense arrays, for backends that accept nothing else."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import depends_on_batch_and_heads
from attnlab.attention.pairwise import BlockOffset, block_indices
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


def zero_masked(
    allowed: Bool[Array, "b h t s"] | None,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K Dv"]]:
    """Return the arrays with 0 for queries without keys, and for keys and values without queries.

    Their weights are 0, but 0 * NaN is NaN: without this, a NaN or infinity in padding or in an
    unused slot of a KV cache would reach the output and the gradients. `allowed` broadcasts to
    (B, H, T, S). None allows every pair.
    """
    if allowed is None:
        return query, key, value
    has_keys = jnp.swapaxes(allowed.any(3), 1, 2)[..., None]  # (B, T, H, 1)
    has_queries = allowed.any(2)  # (B, H, S)
    if has_queries.shape[1] > 1:
        b, h, s = has_queries.shape
        has_queries = has_queries.reshape(b, key.shape[2], h // key.shape[2], s).any(2)
    has_queries = jnp.swapaxes(has_queries, 1, 2)[..., None]  # (B, S, K, 1)
    return jnp.where(has_keys, query, 0), jnp.where(has_queries, key, 0), jnp.where(has_queries, value, 0)


def mask_size(mask: Mask, shape: Shape) -> int:
    """Return the number of elements of `materialize_mask`."""
    by_row, by_head = depends_on_batch_and_heads(mask)
    b, h, t, s = shape
    return (b if by_row else 1) * (h if by_head else 1) * t * s


def format_bytes(size: int) -> str:
    """Return a number of bytes, formatted in GiB."""
    return f"{size / GIB:.1f} GiB"
