"""Content-based selection of key blocks, shared by MoBA and native sparse attention.

Both are causal self-attention. The selection is not differentiated; attention to the selected keys
is.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.masks.base import BlockSummary, Mask
from attnlab.attention.pairwise import pytree, static
from attnlab.errors import InputError


@pytree
class SelectedBlocksMask(Mask):
    """Mask of the key blocks selected for each query.

    Block n holds keys n * size to (n + 1) * size - 1.

    SelectedBlocksMask([[1, 0], [0, 1], [1, 1]], size=2), for one batch row and head:

        keys  0 1 2 3
    query 0   x x . .
    query 1   . . x x
    query 2   x x x x
    """

    selected: Bool[Array, "B H T N"]
    size: int = static()

    dims: ClassVar = {"selected": ("batch", "heads", "queries", None)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return jnp.take(self.selected, at.kv[0, 0, 0] // self.size, axis=3, mode="clip")

    def block_summary(self, grid):
        """See `Mask.block_summary`: count the selected blocks that each grid block overlaps."""
        count, width = grid.num_blocks
        padded = self.pad_to(queries=count * grid.block_q).selected
        rows = padded.reshape(*padded.shape[:2], -1, grid.block_q, padded.shape[3])
        first = jnp.arange(width) * grid.block_kv
        last = jnp.minimum(first + grid.block_kv, grid.num_keys) - 1
        first, last = ((x + grid.offset[3]) // self.size for x in (first, last))

        def count_selected(blocks):
            sums = jnp.pad(jnp.cumsum(blocks, axis=-1), [(0, 0)] * 3 + [(1, 0)])
            return jnp.take(sums, last + 1, axis=-1) - jnp.take(sums, first, axis=-1)

        return BlockSummary(
            count_selected(rows.any(3)) > 0,
            count_selected(rows.all(3)) == (last + 1 - first)[None, None, None],
        )


def block_means(x: Float[Array, "B T K D"], size: int) -> Float[Array, "B N K D"]:
    """Return the mean of each whole block of `size` tokens; a partial last block is dropped."""
    count = x.shape[1] // size
    return x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:]).mean(axis=2)


def select_blocks(
    scores: Float[Array, "B H T N"], always: Bool[Array, "1 1 T M"], size: int, top: int
) -> Bool[Array, "B H T M"]:
    """Return for each query the `top` blocks with the highest scores, up to its own block.

    Blocks in `always` rank before all others. `scores` covers the N whole blocks; M also counts a
    partial last block.
    """
    block, own = block_numbers(scores.shape[2], size)
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, block.size - scores.shape[3])])
    scores = jnp.where(block > own, -jnp.inf, jnp.where(always, jnp.inf, scores))
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return (rank < top) & (block <= own)


def block_numbers(length: int, size: int) -> tuple[Array, Array]:
    """Return the index of each block, (1, 1, 1, M), and of each query's block, (1, 1, T, 1)."""
    block, own = jnp.arange(-(-length // size)), jnp.arange(length) // size
    return block[None, None, None, :], own[None, None, :, None]


def check_selection(name: str, query: Array, key: Array, size: int, top: int, least: int) -> None:
    """Raise InputError if queries and keys differ in length, or `size` or `top` is too small."""
    if query.shape[1] != key.shape[1]:
        raise InputError(
            f"{name}: queries and keys must be the same sequence; "
            f"got lengths {query.shape[1]} and {key.shape[1]}"
        )
    if size < 1 or top < least:
        raise InputError(f"{name}: size must be at least 1 and top at least {least}, not {size} and {top}")
