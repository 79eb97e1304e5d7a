"""Sparse masks: patterns that leave out most keys of a long text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.masks.base import BlockSummary, CountingMask, Index, Mask
from attnlab.attention.masks.intervals import at_least, reach, runs
from attnlab.attention.pairwise import pytree


@pytree
class Dilated(CountingMask):
    """Every `step`-th key of a `Window`, counted from the query (Longformer, arXiv 2004.05150, section 3.1).

    dilated(step=2, left=2, right=2):

        keys  0 1 2 3 4 5
    query 0   x . x . . .
    query 1   . x . x . .
    query 2   x . x . x .
    query 3   . x . x . x
    """

    step: int
    left: int | None = None
    right: int | None = None
    offset: Index = 0

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        here = at.q + self.offset
        first, end = reach(here, self.left, self.right)
        return (at.kv >= first) & (at.kv < end) & ((at.kv - here) % self.step == 0)

    def count_before(self, at):
        """See `CountingMask.count_before`."""
        here = at.q + self.offset
        return (jnp.clip(at.kv, *reach(here, self.left, self.right)) - 1 - here) // self.step


@pytree
class Strided(CountingMask):
    """Causal: the last `stride` keys, and before those every `stride`-th (arXiv 1904.10509, section 4.3).

    strided(2):

        keys  0 1 2 3 4 5
    query 0   x . . . . .
    query 1   x x . . . .
    query 2   x x x . . .
    query 3   . x x x . .
    query 4   x . x x x .
    query 5   . x . x x x
    """

    stride: int
    offset: Index = 0

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        back = at.q + self.offset - at.kv
        return (back >= 0) & ((back <= self.stride) | (back % self.stride == 0))

    def count_before(self, at):
        """See `CountingMask.count_before`: those within the window, and the others."""
        here = at.q + self.offset
        first = here - self.stride
        return jnp.clip(at.kv, first, here + 1) + (jnp.minimum(at.kv, first) - 1 - here) // self.stride


@pytree
class GlobalTokens(Mask):
    """Some tokens see all and are seen by all (Longformer, arXiv 2004.05150, section 3.1).

    global_tokens((1,)):

        keys  0 1 2 3
    query 0   . x . .
    query 1   x x x x
    query 2   . x . .

    Attributes:
      positions: their key indices, (B or 1, N).
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
        q = runs(self._has(queries[None])[:, None], grid.block_q)[..., None, :]
        k = runs(self._has(keys[None])[:, None], grid.block_kv)[:, :, None]
        return BlockSummary(q.any(-1) | k.any(-1), q.all(-1) | k.all(-1))

    def _has(self, index):
        """Whether a token is one of them."""
        positions = jnp.asarray(self.positions)
        shape = (-1, *(1,) * (index.ndim - 1), positions.shape[-1])
        return (positions.reshape(shape) == index[..., None]).any(-1)


@pytree
class Blocks(Mask):
    """A boolean for every block of so many queries and as many keys, such as a router's choice.

    blocks(jnp.array([[True, False], [True, True]]), size=2):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   x x x x
    query 3   x x x x

    Attributes:
      allowed: for each block; the dimensions of batch and heads may be 1. Beyond it nothing is allowed.
      size: tokens of a block.
    """

    allowed: Bool[Array, "B H Q S"]
    size: int

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
        sums, met = jnp.asarray(self.allowed).astype(jnp.int32), []
        for axis, length, step in ((2, grid.num_queries, grid.block_q), (3, grid.num_keys, grid.block_kv)):
            start = np.arange(0, length, step)
            first = (grid.offset[axis] + start) // self.size
            end = (grid.offset[axis] + np.minimum(start + step, length) - 1) // self.size + 1
            sums = jnp.pad(jnp.cumsum(sums, axis), [(int(i == axis), 0) for i in range(4)])
            sums = jnp.take(sums, end, axis, mode="clip") - jnp.take(sums, first, axis, mode="clip")
            met.append(end - first)
        area = met[0][:, None] * met[1][None, :]
        return BlockSummary(sums > 0, sums == area[None, None])


def dilated(step: int, left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """See `Dilated`.

    Raises:
      InputError: a step below 1.
    """
    at_least(1, step=step)
    return Dilated(step, left, right, offset)


def strided(stride: int, offset: Index = 0) -> Mask:
    """See `Strided`.

    Raises:
      InputError: a stride below 1.
    """
    at_least(1, stride=stride)
    return Strided(stride, offset)


def global_tokens(positions: tuple[int, ...] | Int[Array, "*B N"], offset: Index = 0) -> Mask:
    """See `GlobalTokens`; the same positions for every row, (N,), or others for each, (B, N)."""
    array: Any = positions if isinstance(positions, jax.Array) else np.asarray(positions, np.int32)
    return GlobalTokens(array.reshape(-1, array.shape[-1]), offset)


def blocks(allowed: Bool[Array | np.ndarray, "*b Q S"], size: int) -> Mask:
    """See `Blocks`; an array of fewer dimensions serves all heads and rows.

    Raises:
      InputError: a size below 1.
    """
    at_least(1, size=size)
    array: Any = allowed if isinstance(allowed, jax.Array) else np.asarray(allowed)
    return Blocks(array.reshape(*(1,) * (4 - array.ndim), *array.shape), size)


def bigbird(
    length: int, size: int = 64, *, neighbours: int = 1, globals: int = 1, random: int = 3, seed: int = 0
) -> Mask:
    """`Blocks` that see their neighbours, the first blocks, and some at random (arXiv 2007.14062, section 2).

    Args:
      length: queries, and keys.
      size: tokens of a block.
      neighbours: blocks seen on either side.
      globals: first blocks, which see all and are seen by all.
      random: blocks seen beside those, or all if there are fewer.
      seed: of their choice.

    Raises:
      InputError: a length or size below 1, or a negative number.
    """
    at_least(1, length=length, size=size)
    at_least(0, neighbours=neighbours, globals=globals, random=random)
    block = np.arange(-(-length // size))
    query, key = block[:, None], block[None, :]
    allowed = (abs(query - key) <= neighbours) | (query < globals) | (key < globals)
    generator = np.random.default_rng(seed)
    for row in allowed:
        others = np.flatnonzero(~row)
        row[generator.choice(others, min(random, len(others)), replace=False)] = True
    return blocks(allowed, size)
