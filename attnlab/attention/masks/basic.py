"""The masks of text: causal, windows, packed documents, trees of guesses."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.masks.base import BlockGrid, BlockSummary, Index, Mask
from attnlab.attention.masks.intervals import (
    IntervalMask,
    as_row_values,
    broadcast_rows,
    split_blocks,
    window_bounds,
)
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@pytree
class CausalMask(IntervalMask):
    """Key index at most the query's: query i sits at key index i + offset.

    An offset of S - T puts the last of T queries at the last of S keys. causal():

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   x x x .
    """

    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [(0, at.q + self.offset + 1)]

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return at.kv - at.q <= self.offset

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = _distance_bounds(grid)
        return BlockSummary(low <= self.offset, high <= self.offset)


@pytree
class WindowMask(IntervalMask):
    """Keys from `left` before the query to `right` after it, itself included; None is no limit.

    window(left=1, right=0):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   . x x .
    """

    left: int | None = None
    right: int | None = None
    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [window_bounds(at.q + self.offset, self.left, self.right)]

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = (x - self.offset for x in _distance_bounds(grid))
        before, after = window_bounds(0, self.left, self.right)
        return BlockSummary((low < after) & (high >= before), (high < after) & (low >= before))


@pytree
class TreeMask(Mask):
    """Guesses of what comes next, as a tree: each sees the text so far, the guesses it follows, and itself.

    The keys are the text and then the tree, the queries the tree's nodes (SpecInfer, arXiv 2305.09781,
    section 4.2). tree((-1, 0, 0, 1), prefix=2):

        keys  0 1 2 3 4 5
    query 0   x x x . . .
    query 1   x x x x . .
    query 2   x x x . x .
    query 3   x x x x . x

    Attributes:
      ancestors: whether node i is node j or follows it, (B or 1, N, N).
      prefix: length of the text, a number or (B,).
    """

    ancestors: Bool[Array, "B N N"]
    prefix: Index = 0

    dims = {"ancestors": ("batch", None, None), "prefix": ("batch",)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        ancestors, prefix = jnp.asarray(self.ancestors), broadcast_rows(self.prefix)
        node, count = at.kv - prefix, ancestors.shape[-1]
        row = jnp.arange(len(ancestors))[:, None, None, None]
        is_ancestor = ancestors[row, jnp.minimum(at.q, count - 1), jnp.clip(node, 0, count - 1)]
        return (node < 0) | ((node < count) & is_ancestor)


@pytree
class SegmentMask(Mask):
    """Pairs inside one packed document; segment 0 is padding and attends to nothing.

    segments(jnp.array([[1, 1, 2, 0]])):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   . . x .
    query 3   . . . .

    Attributes:
      queries: segment of each query, (B, T).
      keys: segment of each key, (B, S).
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]

    dims = {"queries": ("batch", "queries"), "keys": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        q, k = self.queries[:, None, :, None], self.keys[:, None, None, :]
        return (q == k) & (k > 0)

    def block_summary(self, grid):
        """See `Mask.block_summary`: from the first and last segment of each run of tokens."""
        q = _segment_bounds(self.queries, grid.block_q)
        k = _segment_bounds(self.keys, grid.block_kv)
        q, k = [x[:, None, :, None] for x in q], [x[:, None, None, :] for x in k]
        (q_least, q_first, q_last), (k_least, k_first, k_last) = q, k
        any_allowed = (q_first <= k_last) & (k_first <= q_last)
        all_allowed = (q_least == k_last) & (k_least == k_last) & (q_last == k_last) & (k_last > 0)
        return BlockSummary(any_allowed, all_allowed)


def _distance_bounds(grid: BlockGrid):
    """The least and greatest key index minus query index of each block, (1, 1, query blocks, key blocks)."""
    q, k = np.arange(0, grid.num_queries, grid.block_q), np.arange(0, grid.num_keys, grid.block_kv)
    q_last = np.minimum(q + grid.block_q, grid.num_queries) - 1
    k_last = np.minimum(k + grid.block_kv, grid.num_keys) - 1
    shift = grid.offset[3] - grid.offset[2]
    low, high = k[None, :] - q_last[:, None], k_last[None, :] - q[:, None]
    return low[None, None] + shift, high[None, None] + shift


def _segment_bounds(segments: Array, size: int):
    """Of each run of `size` tokens, (B, runs): the least segment, the least but padding, the greatest."""
    segments = split_blocks(segments, size)
    tokens = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
    return segments.min(-1), tokens.min(-1), segments.max(-1)


def causal(offset: Index = 0) -> Mask:
    """Return the mask that allows the keys at or before the query's own position."""
    return CausalMask(offset)


def window(left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """Return the mask that allows `left` keys before the query, itself, and `right` keys after it."""
    return WindowMask(left, right, offset)


def segments(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Mask:
    """Return the mask that allows pairs within one packed document; `keys` defaults to `queries`."""
    return SegmentMask(queries, queries if keys is None else keys)


def tree(parents: tuple[int, ...] | Int[Array, "*B N"], prefix: Index | Int[Array, " B"] = 0) -> Mask:
    """Return the mask that allows each node of a tree of draft tokens the prefix and its ancestors.

    The parent of each node comes before it; -1 is a node that follows the prefix itself.

    Raises:
      InputError: a parent that does not come before its node.
    """
    if not isinstance(parents, jax.core.Tracer):
        array = np.asarray(parents)
        if (array >= np.arange(array.shape[-1])).any() or (array < -1).any():
            raise InputError(f"tree: a node's parent must be an earlier node, or -1; got {array.tolist()}")
    with jax.ensure_compile_time_eval():
        parents = jnp.asarray(parents)
        return TreeMask(_ancestors(parents.reshape(-1, parents.shape[-1])), as_row_values(prefix))


def _ancestors(parents: Array) -> Array:
    """Whether node i is node j or follows it: steps to the parent, each round twice as many as the last."""
    nodes = jnp.arange(parents.shape[-1])
    reached = (parents[..., None] == nodes[None, None]) | (nodes[:, None] == nodes[None, :])[None]
    for _ in range(len(nodes).bit_length()):
        reached = (reached[..., None] & reached[:, None]).any(2)
    return reached
