"""The masks of text: causal, windows, packed documents, trees of guesses."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.masks.base import BlockGrid, BlockSummary, Index, Mask
from attnlab.attention.masks.intervals import Spans, per_row, reach, rows_of, runs
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@pytree
class Causal(Spans):
    """Key index at most the query's: query i sits at key index i + offset.

    An offset of S - T puts the last of T queries at the last of S keys. causal():

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   x x x .
    """

    offset: Index = 0

    def spans(self, at):
        """See `Spans.spans`."""
        return [(0, at.q + self.offset + 1)]

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        return at.kv - at.q <= self.offset

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = _distances(grid)
        return BlockSummary(low <= self.offset, high <= self.offset)


@pytree
class Window(Spans):
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

    def spans(self, at):
        """See `Spans.spans`."""
        return [reach(at.q + self.offset, self.left, self.right)]

    def block_summary(self, grid):
        """See `Mask.block_summary`."""
        low, high = (x - self.offset for x in _distances(grid))
        before, after = reach(0, self.left, self.right)
        return BlockSummary((low < after) & (high >= before), (high < after) & (low >= before))


@pytree
class Tree(Mask):
    """Guesses of what comes next, as a tree: each sees the text so far, the guesses it follows, and itself.

    The keys are the text and then the tree, the queries the tree's nodes (SpecInfer, arXiv 2305.09781,
    section 4.2). tree((-1, 0, 0, 1), prefix=2):

        keys  0 1 2 3 4 5
    query 0   x x x . . .
    query 1   x x x x . .
    query 2   x x x . x .
    query 3   x x x x . x

    Attributes:
      lineage: whether node i is node j or follows it, (B or 1, N, N).
      prefix: length of the text, a number or (B,).
    """

    lineage: Bool[Array, "B N N"]
    prefix: Index = 0

    dims = {"lineage": ("batch", None, None), "prefix": ("batch",)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        lineage, prefix = jnp.asarray(self.lineage), rows_of(self.prefix)
        node, count = at.kv - prefix, lineage.shape[-1]
        row = jnp.arange(len(lineage))[:, None, None, None]
        among = lineage[row, jnp.minimum(at.q, count - 1), jnp.clip(node, 0, count - 1)]
        return (node < 0) | ((node < count) & among)


@pytree
class Segments(Mask):
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
        q = _extremes(self.queries, grid.block_q)
        k = _extremes(self.keys, grid.block_kv)
        q, k = [x[:, None, :, None] for x in q], [x[:, None, None, :] for x in k]
        (q_least, q_first, q_last), (k_least, k_first, k_last) = q, k
        some = (q_first <= k_last) & (k_first <= q_last)
        every = (q_least == k_last) & (k_least == k_last) & (q_last == k_last) & (k_last > 0)
        return BlockSummary(some, every)


def _distances(grid: BlockGrid):
    """The least and greatest key index minus query index of each tile, (1, 1, query tiles, key tiles)."""
    q, k = np.arange(0, grid.num_queries, grid.block_q), np.arange(0, grid.num_keys, grid.block_kv)
    q_last = np.minimum(q + grid.block_q, grid.num_queries) - 1
    k_last = np.minimum(k + grid.block_kv, grid.num_keys) - 1
    shift = grid.offset[3] - grid.offset[2]
    low, high = k[None, :] - q_last[:, None], k_last[None, :] - q[:, None]
    return low[None, None] + shift, high[None, None] + shift


def _extremes(segments: Array, size: int):
    """Of each run of `size` tokens, (B, runs): the least segment, the least but padding, the greatest."""
    segments = runs(segments, size)
    tokens = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
    return segments.min(-1), tokens.min(-1), segments.max(-1)


def causal(offset: Index = 0) -> Mask:
    """See `Causal`."""
    return Causal(offset)


def window(left: int | None = None, right: int | None = None, offset: Index = 0) -> Mask:
    """See `Window`."""
    return Window(left, right, offset)


def segments(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Mask:
    """See `Segments`; keys default to the queries' own."""
    return Segments(queries, queries if keys is None else keys)


def tree(parents: tuple[int, ...] | Int[Array, "*B N"], prefix: Index | Int[Array, " B"] = 0) -> Mask:
    """See `Tree`; the parent of each node comes before it, -1 where it follows the text itself.

    Raises:
      InputError: a parent that does not come before its node.
    """
    if not isinstance(parents, jax.core.Tracer):
        known = np.asarray(parents)
        if (known >= np.arange(known.shape[-1])).any() or (known < -1).any():
            raise InputError(f"tree: a node's parent must be an earlier node, or -1; got {known.tolist()}")
    with jax.ensure_compile_time_eval():
        parents = jnp.asarray(parents)
        return Tree(_lineage(parents.reshape(-1, parents.shape[-1])), per_row(prefix))


def _lineage(parents: Array) -> Array:
    """Whether node i is node j or follows it: steps to the parent, each round twice as many as the last."""
    nodes = jnp.arange(parents.shape[-1])
    reached = (parents[..., None] == nodes[None, None]) | (nodes[:, None] == nodes[None, :])[None]
    for _ in range(len(nodes).bit_length()):
        reached = (reached[..., None] & reached[:, None]).any(2)
    return reached
