"""Causal and sliding-window masks, packed documents (segments) and trees of draft tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.checks import check_array, check_index, check_window, is_array
from attnlab.attention.masks.base import BlockGrid, BlockSummary, Index, Mask
from attnlab.attention.masks.intervals import (
    IntervalMask,
    as_row_values,
    broadcast_rows,
    split_blocks,
    window_bounds,
)
from attnlab.attention.pairwise import pytree, static
from attnlab.errors import InputError


@pytree
class CausalMask(IntervalMask):
    """Causal mask: a query attends to keys at or before its position, key index i + offset.

    An offset of S - T aligns the last of T queries with the last of S keys. causal():

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
    """Sliding window from `left` keys before the query to `right` keys after it, inclusive.

    None means no limit in that direction.

    window(left=1, right=0):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   . x x .
    """

    left: int | None = static(default=None)
    right: int | None = static(default=None)
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
    """A tree of draft tokens: each node attends to the prefix, its ancestors and itself.

    The keys are the prefix followed by the nodes of the tree; the queries are the nodes (SpecInfer,
    arXiv 2305.09781, section 4.2). tree((-1, 0, 0, 1), prefix=2):

        keys  0 1 2 3 4 5
    query 0   x x x . . .
    query 1   x x x x . .
    query 2   x x x . x .
    query 3   x x x x . x

    Attributes:
      ancestors: whether node j is node i or an ancestor of it, (B or 1, N, N).
      prefix: number of prefix keys, an int or (B,).
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
    """Pairs within one packed document. Segment 0 is padding, which is masked everywhere.

    segments(jnp.array([[1, 1, 2, 0]])):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   . . x .
    query 3   . . . .

    Attributes:
      queries: segment id of each query, (B, T).
      keys: segment id of each key, (B, S).
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]

    dims = {"queries": ("batch", "queries"), "keys": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        q, k = self.queries[:, None, :, None], self.keys[:, None, None, :]
        return (q == k) & (k > 0)

    def block_summary(self, grid):
        """See `Mask.block_summary`: from bounds on the segment ids of each block of tokens."""
        q = _segment_bounds(self.queries, grid.block_q)
        k = _segment_bounds(self.keys, grid.block_kv)
        q, k = [x[:, None, :, None] for x in q], [grid.take_kv_blocks(x[:, None]) for x in k]
        (q_least, q_first, q_last), (k_least, k_first, k_last) = q, k
        any_allowed = (q_first <= k_last) & (k_first <= q_last)
        all_allowed = (q_least == k_last) & (k_least == k_last) & (q_last == k_last) & (k_last > 0)
        return BlockSummary(any_allowed, all_allowed)


def _distance_bounds(grid: BlockGrid):
    """Return the least and greatest key index minus query index of each block, (1, 1, Q, S)."""
    q, k = np.arange(0, grid.num_queries, grid.block_q)[:, None], grid.kv_blocks * grid.block_kv
    q_last = np.minimum(q + grid.block_q, grid.num_queries) - 1
    k_last = np.minimum(k + grid.block_kv, grid.num_keys) - 1
    shift = grid.offset[3] - grid.offset[2]
    low, high = k - q_last, k_last - q
    return low[None, None] + shift, high[None, None] + shift


def _segment_bounds(segments: Array, size: int):
    """Return bounds on the segment ids of each block of `size` tokens, (B, blocks).

    The three results are the least id, the least id that is not padding, and the greatest id.
    """
    segments = split_blocks(segments, size)
    tokens = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
    return segments.min(-1), tokens.min(-1), segments.max(-1)


def causal(offset: Index = 0) -> Mask:
    """Return the mask that allows keys at or before the query's position.

    Raises:
      InputError: `offset` is not an integer.
    """
    check_index("causal", offset=offset)
    return CausalMask(offset)


def window(left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """Return the mask of a window from `left` keys before to `right` keys after the query.

    Raises:
      InputError: an argument is not an integer, or `left` or `right` is negative.
    """
    check_window("window", left, right, offset)
    return WindowMask(left, right, offset)


def segments(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Mask:
    """Return the mask of pairs within one packed document; `keys` defaults to `queries`.

    Raises:
      InputError: the segment ids are not integer arrays (B, T) and (B, S).
    """
    keys = queries if keys is None else keys
    check_array("segments: queries", queries, "integer", 2)
    check_array("segments: keys", keys, "integer", 2)
    return SegmentMask(queries, keys)


def tree(parents: tuple[int, ...] | Int[Array, "*B N"], prefix: Index | Int[Array, " B"] = 0) -> Mask:
    """Return the tree-attention mask: each draft token attends to the prefix and its ancestors.

    Args:
      parents: index of each node's parent, which must precede the node; -1 for children of the
        prefix. (N,), or (B, N) for one tree per batch row.
      prefix: number of keys before the tree, an int or (B,).

    Raises:
      InputError: a parent is not an integer or does not precede its node, or `prefix` is negative.
    """
    check_array(
        "tree: parents", parents if is_array(parents) else np.asarray(parents), "integer", range(1, 3)
    )
    check_index("tree", 1, 0, prefix=prefix)
    if not isinstance(parents, jax.core.Tracer):
        array = np.asarray(parents)
        if (array >= np.arange(array.shape[-1])).any() or (array < -1).any():
            raise InputError(f"tree: each parent must be an earlier node or -1; got {array.tolist()}")
    with jax.ensure_compile_time_eval():
        parents = jnp.asarray(parents)
        return TreeMask(_ancestors(parents.reshape(-1, parents.shape[-1])), as_row_values(prefix))


def _ancestors(parents: Array) -> Array:
    """Return whether node j is node i or an ancestor of it.

    Repeated squaring of the parent relation: each round doubles the number of steps.
    """
    nodes = jnp.arange(parents.shape[-1])
    reached = (parents[..., None] == nodes[None, None]) | (nodes[:, None] == nodes[None, :])[None]
    for _ in range(len(nodes).bit_length()):
        reached = (reached[..., None] & reached[:, None]).any(2)
    return reached
