"""Mixture of block attention (MoBA): softmax attention to key blocks selected by their mean key."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.attend import attend
from attnlab.attention.masks.basic import causal
from attnlab.attention.mixers.block_selection import (
    SelectedBlocksMask,
    block_means,
    block_numbers,
    check_selection,
    select_blocks,
)


def moba(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    *,
    size: int,
    top: int,
    **options,
) -> Float[Array, "B T H Dv"]:
    """Attend from each query to its own block and the top - 1 earlier blocks that score highest.

    The score of a block is the product of the query and the mean key of the block (Lu et al. 2025,
    arXiv 2502.13189, section 2.2).

    Args:
      query: (B, T, H, D).
      key: (B, T, K, D).
      value: (B, T, K, Dv).
      size: keys per block.
      top: blocks that a query attends to, including its own.
      options: further arguments of `attend`, except `mask`.

    Raises:
      InputError: queries and keys differ in length, or `size` or `top` is not positive.
    """
    check_selection("moba", query, key, size, top, 1)
    means = jnp.repeat(block_means(key, size), query.shape[2] // key.shape[2], axis=2)
    block, own = block_numbers(query.shape[1], size)
    selected = select_blocks(jnp.einsum("bthd,bnhd->bhtn", query, means), block == own, size, top)
    return attend(query, key, value, mask=causal() & SelectedBlocksMask(selected, size), **options)
