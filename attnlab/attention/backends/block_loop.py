"""Blocks of a blockwise computation: their arrays and scores, and the loops over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention.arrays import slice_at, wide
from attnlab.attention.backends.reference import MASK_VALUE, stop_masked_gradient
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.pairwise import BlockOffset, block_indices
from attnlab.attention.scores import Score


class QueryBlock(NamedTuple):
    """The block of queries of one step: its first batch row and query head, and its index.

    The first two are 0 if all rows, or all heads, share their lists.
    """

    row: Array | int
    head: Array | int
    block: Array | int


class Blocks:
    """The blocks of one call: their scores, and loops over the blocks of the block mask.

    A step computes the rows and heads that share their lists of blocks.
    """

    def __init__(
        self,
        static,
        query_shape: tuple[int, ...],
        mask: Mask | None,
        score: Score | None,
        dropout: AttentionDropout | None,
        block_mask: BlockMask,
        offset: BlockOffset,
    ):
        self.scale, self.clean = static
        self.mask, self.score, self.dropout = mask, score, dropout
        self.block_mask, self.offset = block_mask, offset
        self.block_q, self.block_kv, self.info = block_mask.block_q, block_mask.block_kv, block_mask.info
        self.shape = query_shape[:3]  # (B, K, G)
        b, kv_heads, group = self.shape
        rows, heads = self.num_lists = block_mask.num_lists
        heads = kv_heads * group // heads
        # (B, K, G) of one step
        self.step_shape = b // rows, *((heads // group, group) if heads >= group else (1, heads))

    def _pair_indices(self, at: QueryBlock, j):
        b, h, q, k = self.offset
        offset = b + at.row, h + at.head, q + at.block * self.block_q, k + j * self.block_kv
        rows, *heads = self.step_shape
        return block_indices(offset, (rows, math.prod(heads), self.block_q, self.block_kv))

    def starts(self, at: QueryBlock, j) -> dict[str, Array | int]:
        """Return the start of a block in the arrays of a mask or score, per named dimension."""
        starts: dict[str, Array | int] = {"queries": at.block * self.block_q, "keys": j * self.block_kv}
        firsts = {"batch": at.row, "heads": at.head}
        listed = zip(firsts, self.num_lists, strict=True)
        return starts | {name: firsts[name] for name, count in listed if count > 1}

    def slice_values(self, value, at: QueryBlock, j):
        """Return a mask, score or dropout with its arrays sliced to a block."""
        rows, *heads = self.step_shape
        sizes = {"queries": self.block_q, "keys": self.block_kv, "batch": rows, "heads": math.prod(heads)}
        return value.slice_block(**{name: (x, sizes[name]) for name, x in self.starts(at, j).items()})

    def slice_queries(self, x: Array, at: QueryBlock, axis: int = 3) -> Array:
        """Return a block of an array of queries (B, K, G, T, ...), or (B, K, D, G, T) at axis 4."""
        group, group_axis = self.shape[2], axis - 1
        starts: list[Array | int] = [0] * x.ndim
        sizes = list(x.shape)
        starts[:2], starts[group_axis] = [at.row, at.head // group], at.head % group
        sizes[:2], sizes[group_axis] = self.step_shape[:2], self.step_shape[2]
        starts[axis], sizes[axis] = at.block * self.block_q, self.block_q
        return slice_at(x, starts, sizes)

    def key_starts(self, at: QueryBlock, j, axis: int) -> list[Array | int]:
        """Return the start of a block in an array of keys (B, K, ...) with its length on `axis`."""
        starts = [at.row, at.head // self.shape[2], 0, 0]
        starts[axis] = j * self.block_kv
        return starts

    def slice_keys(self, x: Array, at: QueryBlock, j) -> Array:
        """Return the block of an array of keys (B, K, S, D)."""
        sizes = *self.step_shape[:2], self.block_kv, x.shape[3]
        return slice_at(x, self.key_starts(at, j, 2), sizes)

    def allowed_pairs(self, at: QueryBlock, j):
        """Return the allowed pairs of a block, (B or 1, K or 1, G or 1, block_q, block_kv)."""
        local = j * self.block_kv + jnp.arange(self.block_kv)
        allowed = (local < self.block_mask.kv_length)[None, None, None, :]
        if self.mask is not None:
            pairs = self._pair_indices(at, j)
            allowed = allowed & self.slice_values(self.mask, at, j).evaluate(pairs)
        heads = (1, 1) if allowed.shape[1] == 1 else self.step_shape[1:]
        allowed = allowed.reshape(-1, *heads, *allowed.shape[2:])
        return jnp.broadcast_to(allowed, (*allowed.shape[:3], self.block_q, self.block_kv))

    def zero_masked_keys(self, allowed, *arrays):
        """Return keys or values with 0 for those without queries; see `zero_masked`."""
        if allowed is None or self.clean:
            return arrays
        return tuple(jnp.where(allowed.any((2, 3))[..., None], x, 0) for x in arrays)

    def scores(self, q, k, at: QueryBlock, j, allowed):
        """Return the scores of a block and their VJP.

        The scores are (B, K, G, block_q, block_kv). The VJP returns the gradients of the products
        of queries and keys, and of the `Score`. `allowed` is from `allowed_pairs`, or None.
        """
        raw = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=wide(q))
        shape, flat = raw.shape, (raw.shape[0], raw.shape[1] * raw.shape[2], *raw.shape[3:])
        scores, pull_back = self._scaled(raw), lambda g: (self._scaled(g), None)
        if self.score is not None:
            pairs = self._pair_indices(at, j)
            allowed_4d = None if allowed is None else allowed.reshape(len(allowed), -1, *flat[2:])
            modified, score_vjp = jax.vjp(
                lambda x, score: score(stop_masked_gradient(allowed_4d, x), pairs),
                scores.reshape(flat),
                self.slice_values(self.score, at, j),
            )
            scores = modified.reshape(shape)

            def pull_back(g):
                g, g_score = score_vjp(g.reshape(flat).astype(modified.dtype))
                return self._scaled(g.reshape(shape)), g_score

        return scores if allowed is None else jnp.where(allowed, scores, MASK_VALUE), pull_back

    def drop(self, weights, at: QueryBlock, j):
        """Return the weights of a block, or their gradients, after dropout."""
        if self.dropout is None:
            return weights
        flat = weights.reshape(len(weights), -1, *weights.shape[3:])
        kept = self.slice_values(self.dropout, at, j)(flat, self._pair_indices(at, j))
        return kept.reshape(weights.shape)

    def _scaled(self, x):
        return x if self.scale == 1 else self.scale * x

    def kv_lists(self, at: QueryBlock):
        """Return the full kv blocks of a block of queries, their number, and the partial ones."""
        rows, *heads = self.step_shape
        index, mask = (at.row // rows, at.head // math.prod(heads), at.block), self.block_mask
        lists = mask.full_kv_indices, mask.full_kv_num_blocks, mask.kv_indices, mask.kv_num_blocks
        return tuple(jnp.asarray(x)[index] for x in lists)

    def loop_kv_blocks(self, step, carry, at: QueryBlock):
        """Fold `step(carry, j, masked)` over the kv blocks of a block of queries."""
        if self.info.unrolled is not None:
            for j, masked in self.info.unrolled[at.block]:
                carry = step(carry, j, masked)
            return carry
        full, num_full, partial_, num_partial = self.kv_lists(at)
        if self.info.has_full:
            carry = jax.lax.fori_loop(0, num_full, lambda n, c: step(c, full[n], False), carry)
        if self.info.has_partial:
            carry = jax.lax.fori_loop(0, num_partial, lambda n, c: step(c, partial_[n], True), carry)
        return carry

    def map_q_blocks(self, step, carry):
        """Scan `step(carry, at)` over blocks of queries; return its outputs (B, K, G, T, ...)."""
        count = self.block_mask.num_blocks[0]
        if self.info.unrolled is not None:
            results = []
            for i in range(count):
                carry, result = step(carry, QueryBlock(0, 0, i))
                results.append(result)
            return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *results)
        rows, heads = self.num_lists
        indices = np.indices((rows, heads, count)).reshape(3, -1).T
        step_rows, *step_heads = self.step_shape
        firsts = indices * np.array([step_rows, math.prod(step_heads), 1])
        carry, parts = jax.lax.scan(lambda c, at: step(c, QueryBlock(*at)), carry, jnp.asarray(firsts))
        kv_heads, group = (n // m for n, m in zip(self.shape[1:], step_heads, strict=True))

        def join(x):
            # (rows, kv heads, heads of a group, blocks of queries) of the steps, then of one step
            x = x.reshape(rows, kv_heads, group, count, *x.shape[1:])
            x = x.transpose(0, 4, 1, 5, 2, 6, 3, *range(7, x.ndim))
            return x.reshape(*self.shape, count * self.block_q, *x.shape[8:])

        return carry, jax.tree.map(join, parts)
