"""Native sparse attention (NSA): gated compressed, selected and sliding-window attention."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.attend import attend
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import causal, window
from attnlab.attention.mixers.block_selection import (
    SelectedBlocksMask,
    block_numbers,
    check_selection,
    select_blocks,
)
from attnlab.attention.pairwise import pytree, static
from attnlab.errors import InputError


@pytree
class CompletedBlocksMask(Mask):
    """Mask over compressed keys, one per block: blocks that end at or before the query.

    CompletedBlocksMask(size=2):

      blocks  0 1
    query 0   . .
    query 1   x .
    query 2   x .
    query 3   x x
    """

    size: int = static()

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return (at.kv + 1) * self.size <= at.q + 1


def nsa(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    coarse_key: Float[Array, "B N K D"],
    coarse_value: Float[Array, "B N K Dv"],
    gates: Float[Array, "B T H 3"],
    *,
    size: int,
    top: int,
    left: int,
    scale: float | None = None,
    **options,
) -> Float[Array, "B T H Dv"]:
    """Native sparse attention: g1 * compressed + g2 * selected + g3 * sliding-window attention.

    (Yuan et al. 2025, arXiv 2502.11089, equation 5.) Compression and selection use the same blocks.
    Query heads that share a key head select the same blocks, by the sum of their weights on the
    compressed keys (equation 10). The first block, the query's own block and the block before it
    are always selected.

    Args:
      query: (B, T, H, D).
      key: (B, T, K, D).
      value: (B, T, K, Dv).
      coarse_key: compressed key of each whole block, N = T // size, from `block_means` or a learned
        function.
      coarse_value: compressed value of each whole block.
      gates: factors (g1, g2, g3) of the three branches, in [0, 1].
      size: keys per block.
      top: blocks selected per query, including the three fixed ones.
      left: number of keys before the query in its sliding window.
      scale: factor of the scores; defaults to 1 / sqrt(D).
      options: further arguments of `attend`, except `mask`, for the selected and window branches.

    Raises:
      InputError: queries and keys differ in length, N is not T // size, or `top` is below 3.
    """
    check_selection("nsa", query, key, size, top, 3)
    (b, t, h, d), k, n = query.shape, key.shape[2], coarse_key.shape[1]
    if n != t // size:
        raise InputError(f"nsa: {t} keys have {t // size} whole blocks of {size}; coarse_key has {n}")
    scale = 1 / math.sqrt(d) if scale is None else scale
    coarse, weights = attend(
        query, coarse_key, coarse_value, mask=CompletedBlocksMask(size), scale=scale, return_weights=True
    )
    importance = weights.reshape(b, k, h // k, t, n).sum(axis=2)
    block, own = block_numbers(t, size)
    selected = select_blocks(importance, (block == 0) | (own - block == 0) | (own - block == 1), size, top)
    mask = causal() & SelectedBlocksMask(jnp.repeat(selected, h // k, axis=1), size)
    fine = attend(query, key, value, mask=mask, scale=scale, **options)
    near = attend(query, key, value, mask=window(left, 0), scale=scale, **options)
    branches = jnp.stack([coarse, fine, near], axis=-1)
    return jnp.sum(branches * gates[..., None, :].astype(branches.dtype), axis=-1)
