"""Sparse attention whose blocks of keys are chosen by content: MoBA and NSA, as masks for `attend`.

Both are causal attention of a sequence to itself. What is chosen gets no gradient; what is attended to does.
"""

import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.attend import attend
from attnlab.attention.masks.base import BlockSummary, Mask
from attnlab.attention.masks.basic import causal, window
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@pytree
class Chosen(Mask):
    """Keys of the blocks that each query has chosen: block n is keys n * size to (n + 1) * size - 1.

    Chosen([[1, 0], [0, 1], [1, 1]], size=2), of one row and head:

        keys  0 1 2 3
    query 0   x x . .
    query 1   . . x x
    query 2   x x x x
    """

    chosen: Bool[Array, "B H T N"]
    size: int

    dims: ClassVar = {"chosen": ("batch", "heads", "queries", None)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return jnp.take(self.chosen, at.kv[0, 0, 0] // self.size, axis=3, mode="clip")

    def block_summary(self, grid):
        """See `Mask.block_summary`: from the number of chosen blocks that a block of keys overlaps."""
        count, width = grid.num_blocks
        padded = self.pad_to(queries=count * grid.block_q).chosen
        rows = padded.reshape(*padded.shape[:2], -1, grid.block_q, padded.shape[3])
        first = jnp.arange(width) * grid.block_kv
        last = jnp.minimum(first + grid.block_kv, grid.num_keys) - 1
        first, last = ((x + grid.offset[3]) // self.size for x in (first, last))

        def among(blocks):
            sums = jnp.pad(jnp.cumsum(blocks, axis=-1), [(0, 0)] * 3 + [(1, 0)])
            return jnp.take(sums, last + 1, axis=-1) - jnp.take(sums, first, axis=-1)

        return BlockSummary(
            among(rows.any(3)) > 0, among(rows.all(3)) == (last + 1 - first)[None, None, None]
        )


@pytree
class Past(Mask):
    """Blocks of keys that end at the query or before it, each block being one key.

    Past(size=2):

      blocks  0 1
    query 0   . .
    query 1   x .
    query 2   x .
    query 3   x x
    """

    size: int

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return (at.kv + 1) * self.size <= at.q + 1


def moba(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    *,
    size: int,
    top: int,
    **how,
) -> Float[Array, "B T H Dv"]:
    """Each query attends to its own block and the top - 1 earlier ones whose mean key it scores highest (Lu
    et al. 2025, arXiv 2502.13189, section 2.2).

    Args:
      query: (B, T, H, D).
      key: (B, T, K, D).
      value: (B, T, K, Dv).
      size: keys in a block.
      top: blocks that a query attends to.
      how: what else `attend` takes but a mask.

    Raises:
      InputError: queries and keys are not of one sequence, or `size` or `top` is not positive.
    """
    _check("moba", query, key, size, top, 1)
    means = jnp.repeat(block_means(key, size), query.shape[2] // key.shape[2], axis=2)
    block, own = _blocks(query.shape[1], size)
    chosen = choose_blocks(jnp.einsum("bthd,bnhd->bhtn", query, means), block == own, size, top)
    return attend(query, key, value, mask=causal() & Chosen(chosen, size), **how)


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
    **how,
) -> Float[Array, "B T H Dv"]:
    """g1 * attention to compressed blocks + g2 * to chosen blocks + g3 * to a window (Native Sparse
    Attention, Yuan et al. 2025, arXiv 2502.11089, equation 5), compressed and chosen blocks being the same.

    The heads that share a key head choose together, by the sum of their weights on compressed blocks
    (equation 10); the first block, the query's own and the one before it are always among the chosen.

    Args:
      query: (B, T, H, D).
      key: (B, T, K, D).
      value: (B, T, K, Dv).
      coarse_key: one key of each whole block, N = T // size, as `block_means` or a learned function gives.
      coarse_value: its value.
      gates: the factors of the three, in [0, 1].
      size: keys in a block.
      top: blocks that a query chooses.
      left: how many keys before the query are in its window.
      scale: factor of the scores; None is 1 / sqrt(D).
      how: what else `attend` takes but a mask, for chosen blocks and window.

    Raises:
      InputError: queries and keys are not of one sequence, blocks are not T // size, or `top` is under 3.
    """
    _check("nsa", query, key, size, top, 3)
    (b, t, h, d), k, n = query.shape, key.shape[2], coarse_key.shape[1]
    if n != t // size:
        raise InputError(f"nsa: {t} keys are {t // size} whole blocks of {size}, not {n}")
    scale = 1 / math.sqrt(d) if scale is None else scale
    coarse, weights = attend(
        query, coarse_key, coarse_value, mask=Past(size), scale=scale, return_weights=True
    )
    together = weights.reshape(b, k, h // k, t, n).sum(axis=2)
    block, own = _blocks(t, size)
    chosen = choose_blocks(together, (block == 0) | (own - block == 0) | (own - block == 1), size, top)
    mask = causal() & Chosen(jnp.repeat(chosen, h // k, axis=1), size)
    fine = attend(query, key, value, mask=mask, scale=scale, **how)
    near = attend(query, key, value, mask=window(left, 0), scale=scale, **how)
    branches = jnp.stack([coarse, fine, near], axis=-1)
    return jnp.sum(branches * gates[..., None, :].astype(branches.dtype), axis=-1)


def block_means(x: Float[Array, "B T K D"], size: int) -> Float[Array, "B N K D"]:
    """The mean of each whole block of `size` tokens; what is left at the end is in none."""
    count = x.shape[1] // size
    return x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:]).mean(axis=2)


def choose_blocks(
    scores: Float[Array, "B H T N"], always: Bool[Array, "1 1 T M"], size: int, top: int
) -> Bool[Array, "B H T M"]:
    """For each query the `top` blocks of highest score, none after its own; those in `always` come first.

    Scores are of whole blocks; M counts what is left at the end as one more.
    """
    block, own = _blocks(scores.shape[2], size)
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, block.size - scores.shape[3])])
    scores = jnp.where(block > own, -jnp.inf, jnp.where(always, jnp.inf, scores))
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return (rank < top) & (block <= own)


def _blocks(length: int, size: int) -> tuple[Array, Array]:
    """The number of each block, (1, 1, 1, M), and of the block that each query lies in, (1, 1, T, 1)."""
    block, own = jnp.arange(-(-length // size)), jnp.arange(length) // size
    return block[None, None, None, :], own[None, None, :, None]


def _check(name: str, query: Array, key: Array, size: int, top: int, least: int) -> None:
    if query.shape[1] != key.shape[1]:
        raise InputError(
            f"{name}: queries and keys are of one sequence, not {query.shape[1]} and {key.shape[1]}"
        )
    if size < 1 or top < least:
        raise InputError(f"{name}: size must be at least 1 and top at least {least}, not {size} and {top}")
