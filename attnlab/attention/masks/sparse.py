"""Sparse masks for long sequences: dilated, strided, global tokens, block-sparse and BigBird."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.arrays import check_array, check_at_least, check_index, check_window, is_array
from attnlab.attention.masks.base import BlockSummary, CountingMask, Index, Mask
from attnlab.attention.masks.intervals import split_blocks, window_bounds
from attnlab.attention.pairwise import pytree, static


@pytree
class DilatedMask(CountingMask):
    """Sliding window that keeps every `step`-th key, counted from the query.

    (Longformer, arXiv 2004.05150, section 3.1.) dilated(step=2, left=2, right=2):

        keys  0 1 2 3 4 5
    query 0   x . x . . .
    query 1   . x . x . .
    query 2   x . x . x .
    query 3   . x . x . x
    """

    step: int = static()
    left: int | None = static(default=None)
    right: int | None = static(default=None)
    offset: Index = 0

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        position = at.q + self.offset
        first, end = window_bounds(position, self.left, self.right)
        return (at.kv >= first) & (at.kv < end) & ((at.kv - position) % self.step == 0)

    def count_before(self, at):
        """See `CountingMask.count_before`."""
        position = at.q + self.offset
        return (jnp.clip(at.kv, *window_bounds(position, self.left, self.right)) - 1 - position) // self.step


@pytree
class StridedMask(CountingMask):
    """Causal attention to the last `stride` keys and to every `stride`-th key before those.

    (Sparse Transformer, arXiv 1904.10509, section 4.3.) strided(2):

        keys  0 1 2 3 4 5
    query 0   x . . . . .
    query 1   x x . . . .
    query 2   x x x . . .
    query 3   . x x x . .
    query 4   x . x x x .
    query 5   . x . x x x
    """

    stride: int = static()
    offset: Index = 0

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        back = at.q + self.offset - at.kv
        return (back >= 0) & ((back <= self.stride) | (back % self.stride == 0))

    def count_before(self, at):
        """See `CountingMask.count_before`: keys in the window, plus the strided keys before it."""
        position = at.q + self.offset
        first = position - self.stride
        in_window = jnp.clip(at.kv, first, position + 1)
        return in_window + (jnp.minimum(at.kv, first) - 1 - position) // self.stride


@pytree
class GlobalTokenMask(Mask):
    """Global tokens attend to all keys, and all queries attend to global tokens.

    (Longformer, arXiv 2004.05150, section 3.1.)

    global_tokens((1,)):

        keys  0 1 2 3
    query 0   . x . .
    query 1   x x x x
    query 2   . x . .

    Attributes:
      positions: key indices of the global tokens, (B or 1, N).
      offset: key index of the first query.
    """

    positions: Int[Array, "B N"]
    offset: Index = 0

    dims = {"positions": ("batch", None)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return self._has(at.q + self.offset) | self._has(at.kv)

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        queries = grid.offset[2] + self.offset + jnp.arange(grid.num_queries)
        keys = grid.offset[3] + jnp.arange(grid.num_keys)
        q = split_blocks(self._has(queries[None])[:, None], grid.block_q)[..., None, :]
        k = split_blocks(self._has(keys[None])[:, None], grid.block_kv)
        k_any, k_all = (grid.take_kv_blocks(x) for x in (k.any(-1), k.all(-1)))
        return BlockSummary(q.any(-1) | k_any, q.all(-1) | k_all)

    def _has(self, index):
        """Return whether each token is a global token."""
        positions = jnp.asarray(self.positions)
        shape = (-1, *(1,) * (index.ndim - 1), positions.shape[-1])
        return (positions.reshape(shape) == index[..., None]).any(-1)


@pytree
class BlockSparseMask(Mask):
    """Block-sparse mask: one boolean for each block of `size` queries by `size` keys.

    blocks(jnp.array([[True, False], [True, True]]), size=2):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   x x x x
    query 3   x x x x

    Attributes:
      allowed: whether each block is allowed; the dimensions of batch and heads may be 1. Pairs
        beyond the array are masked.
      size: tokens per block.
    """

    allowed: Bool[Array, "B H Q S"]
    size: int = static()

    dims = {"allowed": ("batch", "heads", None, None)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        allowed = jnp.asarray(self.allowed)
        for axis, index in ((2, at.q), (3, at.kv)):
            index = jnp.where(index < 0, allowed.shape[axis], index // self.size)
            allowed = jnp.take_along_axis(allowed, index, axis, mode="fill", fill_value=False)
        return allowed

    def block_summary(self, grid):
        """See `Mask.block_summary`: from prefix sums over the allowed blocks."""
        sums, overlaps = jnp.asarray(self.allowed).astype(jnp.int32), []
        for axis, length, step in ((2, grid.num_queries, grid.block_q), (3, grid.num_keys, grid.block_kv)):
            start = np.arange(0, length, step)
            first = (grid.offset[axis] + start) // self.size
            end = (grid.offset[axis] + np.minimum(start + step, length) - 1) // self.size + 1
            sums = jnp.pad(jnp.cumsum(sums, axis), [(int(i == axis), 0) for i in range(4)])
            sums = jnp.take(sums, end, axis, mode="clip") - jnp.take(sums, first, axis, mode="clip")
            overlaps.append(end - first)
        area = overlaps[0][:, None] * overlaps[1][None, :]
        return BlockSummary(sums > 0, sums == area[None, None])


def dilated(step: int, left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """Return the sliding-window mask of every `step`-th key, counted from the query.

    Raises:
      InputError: `step` is below 1, `left` or `right` is negative, or one is not an integer.
    """
    check_at_least(1, "dilated: ", step=step)
    check_window("dilated", left, right, offset)
    return DilatedMask(step, left, right, offset)


def strided(stride: int, offset: Index = 0) -> Mask:
    """Return the causal mask of the last `stride` keys and every `stride`-th key before those.

    Raises:
      InputError: `stride` is below 1.
    """
    check_at_least(1, "strided: ", stride=stride)
    check_index("strided", offset=offset)
    return StridedMask(stride, offset)


def global_tokens(positions: tuple[int, ...] | Int[Array, "*B N"], offset: Index = 0) -> Mask:
    """Return the mask that allows all pairs in which query or key is a global token.

    Positions of shape (N,) apply to every batch row; (B, N) sets them per row.

    Raises:
      InputError: a position is not an integer.
    """
    array: Any = positions if is_array(positions) else np.asarray(positions or np.zeros(0, np.int32))
    check_array("global_tokens: positions", array, "integer", range(1, 3))
    check_index("global_tokens", offset=offset)
    array = array if isinstance(array, jax.Array) else array.astype(np.int32)
    return GlobalTokenMask(array.reshape(-1, array.shape[-1]), offset)


def blocks(allowed: Bool[Array | np.ndarray, "*b Q S"], size: int) -> Mask:
    """Return the block-sparse mask that allows the given blocks of `size` queries by `size` keys.

    An array of fewer than four dimensions applies to all batch rows and heads.

    Raises:
      InputError: `allowed` is not a boolean array of 2 to 4 dimensions, or `size` is below 1.
    """
    check_at_least(1, "blocks: ", size=size)
    array: Any = allowed if isinstance(allowed, jax.Array) else np.asarray(allowed)
    check_array("blocks: allowed", array, "boolean", range(2, 5))
    return BlockSparseMask(array.reshape(*(1,) * (4 - array.ndim), *array.shape), size)


def bigbird(
    length: int, size: int = 64, *, neighbours: int = 1, globals: int = 1, random: int = 3, seed: int = 0
) -> Mask:
    """Return BigBird's mask of neighbouring, global and random blocks.

    (arXiv 2007.14062, section 2.)

    Args:
      length: number of queries and of keys.
      size: tokens per block.
      neighbours: neighbouring blocks on each side of a query's block.
      globals: number of first blocks that attend to all blocks and that all blocks attend to.
      random: further blocks for each block of queries, or all remaining ones if there are fewer.
      seed: seed of the random blocks.

    Raises:
      InputError: `length` or `size` is below 1, or another number is negative.
    """
    check_at_least(1, "bigbird: ", length=length, size=size)
    check_at_least(0, "bigbird: ", neighbours=neighbours, globals=globals, random=random, seed=seed)
    block = np.arange(-(-length // size))
    query, key = block[:, None], block[None, :]
    allowed = (abs(query - key) <= neighbours) | (query < globals) | (key < globals)
    generator = np.random.default_rng(seed)
    for row in allowed:
        others = np.flatnonzero(~row)
        row[generator.choice(others, min(random, len(others)), replace=False)] = True
    return blocks(allowed, size)
