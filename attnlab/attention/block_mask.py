"""Block masks: the blocks that a backend visits, computed at trace time or at run time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.arrays import eval_at_trace_time
from attnlab.attention.masks.base import BlockGrid, Mask
from attnlab.attention.masks.basic import is_static, normal_form, static_part
from attnlab.attention.pairwise import Dims, pytree, restrict_to_bounds, static, summarize_blocks


@dataclass(frozen=True)
class StaticBlockInfo:
    """Properties of a block mask that are static.

    Attributes:
      has_full: whether any block may be full.
      has_partial: whether any block may be partial.
      unrolled: for each block of queries, its pairs (kv block, needs the mask), if there are few
        enough blocks to unroll the loop over them. None otherwise.
    """

    has_full: bool = True
    has_partial: bool = True
    unrolled: tuple[tuple[tuple[int, bool], ...], ...] | None = None


@pytree
class BlockMask:
    """The blocks of keys that each block of queries attends to, and the transpose.

    A full block allows every pair. A partial block allows some pairs and needs the mask. The fields
    are those of FlexAttention (arXiv 2412.05496, section 4.2). B and H are the numbers of groups of
    consecutive batch rows, and of query heads, that share their lists: 1 if all do. Q and S are the
    numbers of blocks along queries and keys; N is at most S, and M at most Q. An index is defined
    only if the number of blocks covers it.

    Attributes:
      kv_num_blocks: number of partial kv blocks of each block of queries.
      kv_indices: the partial kv blocks of each block of queries, in order.
      full_kv_num_blocks: number of full kv blocks of each block of queries.
      full_kv_indices: the full kv blocks of each block of queries, in order.
      q_num_blocks: number of partial blocks of queries of each kv block.
      q_indices: the partial blocks of queries of each kv block, in order.
      full_q_num_blocks: number of full blocks of queries of each kv block.
      full_q_indices: the full blocks of queries of each kv block, in order.
      block_q: queries of a block.
      block_kv: keys of a block.
      q_length: number of queries T.
      kv_length: number of keys S.
      info: static properties of the blocks.
    """

    kv_num_blocks: Int[Array, "B H Q"]
    kv_indices: Int[Array, "B H Q N"]
    full_kv_num_blocks: Int[Array, "B H Q"]
    full_kv_indices: Int[Array, "B H Q N"]
    q_num_blocks: Int[Array, "B H S"]
    q_indices: Int[Array, "B H S M"]
    full_q_num_blocks: Int[Array, "B H S"]
    full_q_indices: Int[Array, "B H S M"]
    block_q: int = static()
    block_kv: int = static()
    q_length: int = static()
    kv_length: int = static()
    info: StaticBlockInfo = static(default=StaticBlockInfo())

    @classmethod
    def from_partial_and_full(
        cls,
        partial: Bool[Array | np.ndarray, "B H Q N"],
        full: Bool[Array | np.ndarray, "B H Q N"],
        grid: BlockGrid,
        info: StaticBlockInfo = StaticBlockInfo(),
    ) -> Self:
        """Return the block mask of these partial and full blocks.

        The columns are all kv blocks, or those of the band of the grid. NumPy arrays give lists as
        NumPy arrays.
        """
        lists: list[Any] = [*_to_lists(partial, grid.band), *_to_lists(full, grid.band)]
        for flags in (partial, full):
            lists += _to_lists(*_transpose(flags, grid.band, grid.num_blocks[1]))
        sizes = grid.block_q, grid.block_kv, grid.num_queries, grid.num_keys
        return cls(*lists, *sizes, info)  # type: ignore[call-arg]  # a dataclass by `pytree`

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The lists and their lengths, in the order of the fields."""
        return tuple(jax.tree.leaves(self))

    def with_arrays(self, arrays: Sequence[Any]) -> Self:
        """Return a copy with these `arrays`."""
        return jax.tree.unflatten(jax.tree.structure(self), arrays)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Number of blocks along queries, and along keys."""
        return self.kv_num_blocks.shape[2], self.q_num_blocks.shape[2]

    @property
    def block_sizes(self) -> tuple[int, int]:
        """block_q and block_kv."""
        return self.block_q, self.block_kv

    @property
    def num_lists(self) -> tuple[int, int]:
        """Number of groups of batch rows, and of heads, that share lists."""
        return self.kv_num_blocks.shape[0], self.kv_num_blocks.shape[1]

    @property
    def num_visits(self) -> Any:
        """Number of blocks that are not empty, over all lists."""
        return self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum()

    def to_dense(self) -> tuple[Bool[Array, "B H Q S"], Bool[Array, "B H Q S"]]:
        """Return which blocks are partial, and which are full."""

        def mark(counts, indices):
            listed = jnp.arange(indices.shape[-1])[None, None, None] < counts[..., None]
            dense = jnp.zeros((*indices.shape[:-1], self.num_blocks[1]), bool)
            return jnp.put_along_axis(dense, indices, listed, axis=-1, inplace=False)

        return mark(self.kv_num_blocks, self.kv_indices), mark(self.full_kv_num_blocks, self.full_kv_indices)

    def map_arrays(self, change: Callable[[Array, Dims], Any]) -> Self:
        """Return a copy in which every array x is `change(x, names of its dimensions)`."""

        dims = [("batch", "heads", blocks, None) for blocks in ["q_blocks"] * 4 + [None] * 4]
        changed = (change(x, names[: jnp.ndim(x)]) for x, names in zip(self.arrays, dims, strict=True))
        return self.with_arrays(list(changed))


# Up to these limits, loops over blocks are unrolled. So few unrolled blocks compile quickly and run
# faster than a loop. XLA may hold the scores of all unrolled blocks at once: 2^22 scores are 16 MiB
# in float32.
FEW_BLOCKS, FEW_SCORES = 24, 2**22
# Rows, or heads, have lists of their own only if a block then has at least this many scores: one
# step of a loop has a fixed cost.
MIN_SCORES = 2**15
FEW_QUERIES, MAX_BLOCK_SCORES = 16, 2**26  # of blocks on a TPU or GPU
# Of a step of one batch row on a CPU. XLA divides the operations of a larger step among the cores,
# which takes longer than it saves until there are millions of scores.
MAX_STEP_SCORES = 2**15


def even_block_size(length: int, max_size: int) -> int:
    """Return the size of the fewest equal parts of `length` that are at most `max_size` long."""
    return -(-length // -(-length // max_size))


def default_block_sizes(
    num_queries: int, num_keys: int, mask: Mask | None = None, platform: str = "cpu", rows: int = 1
) -> tuple[int, int]:
    """Return block_q and block_kv of a loop in plain JAX over `rows` batch rows times heads.

    The sizes for CPUs were the fastest there: the scores of a block should fit into the cache, and
    a causal mask skips a larger fraction of smaller blocks. So do packed documents, which leave few
    pairs of a large block. On a GPU the launches of kernels limit small blocks: blocks have 1024
    queries and keys, or less where the scores of a block, of all rows and heads, are over 2^26
    (256 MiB). On a TPU or GPU, few queries take all keys at once.
    """
    if platform != "cpu" and num_queries <= FEW_QUERIES:
        return num_queries, even_block_size(num_keys, MAX_BLOCK_SCORES // (rows * num_queries) or 1)
    if platform == "gpu":
        size = 1024
        while size > 256 and rows * size**2 > MAX_BLOCK_SCORES:
            size //= 2
        return even_block_size(num_queries, size), even_block_size(num_keys, size)
    if num_queries <= 1024 and num_keys <= 1024:
        q, kv = (even_block_size(n, min(128, max(64, -(-n // 4)))) for n in (num_queries, num_keys))
        return q, kv
    max_q, max_kv = (128, 128) if normal_form(mask).segments is not None else (256, 512)
    return even_block_size(num_queries, max_q), even_block_size(num_keys, max_kv)


@jax.named_scope("make_block_mask")
def make_block_mask(mask: Mask | None, grid: BlockGrid) -> BlockMask:
    """Return the block mask of a mask over a grid, computed at trace time where possible.

    Traced parts of the mask, such as segment ids, are ignored when the static part leaves at most
    `FEW_BLOCKS` blocks with at most `FEW_SCORES` scores. Otherwise the block mask is computed at
    run time. Rows and heads share their lists if a block of one of them has less than `MIN_SCORES`
    scores, and over Auto mesh axes, where a loop over rows would gather them.
    """
    part, all_static = static_part(mask, grid.offset)
    if is_static(grid.offset[2:]):
        static_grid = grid._replace(offset=(0, 0, *grid.offset[2:]))
        grid = grid._replace(band=_static_band(part, static_grid))
        if all_static or part is not None:
            any_allowed, all_allowed = eval_at_trace_time(
                lambda: _summarize(part, static_grid._replace(band=grid.band))
            )
            all_allowed = all_allowed & all_static
            shared = any_allowed.any((0, 1), keepdims=True), all_allowed.all((0, 1), keepdims=True)
            unrolled = _unrolled_kv_blocks(*shared, grid)
            if all_static or unrolled is not None:
                blocks = shared if unrolled is not None else _share_lists(any_allowed, all_allowed, grid)
                any_allowed, all_allowed = _without_repeats(*np.broadcast_arrays(*blocks))
                has_partial = bool((any_allowed & ~all_allowed).any())
                info = StaticBlockInfo(bool((any_allowed & all_allowed).any()), has_partial, unrolled)
                return _from_summary(any_allowed, all_allowed, grid, info)
    any_allowed, all_allowed = _summarize(mask, grid)
    return _from_summary(*_share_lists(any_allowed, all_allowed, grid), grid, StaticBlockInfo())


def _from_summary(any_allowed, all_allowed, grid: BlockGrid, info: StaticBlockInfo) -> BlockMask:
    partial, full = any_allowed & ~all_allowed, any_allowed & all_allowed
    return BlockMask.from_partial_and_full(partial, full, grid, info)


def _static_band(part: Mask | None, grid: BlockGrid):
    """Return the band of kv blocks that the static part of a mask leaves; see `BlockGrid.band`."""
    if grid.num_blocks[1] < 4:  # a band would save nothing
        return None
    band = eval_at_trace_time(lambda: restrict_to_bounds(grid, part).band)
    return band if band is None else (int(band[0]), band[1])


def _unrolled_kv_blocks(any_allowed, all_allowed, grid: BlockGrid):
    any_allowed, all_allowed = any_allowed[0, 0], all_allowed[0, 0]
    scores = any_allowed.sum() * grid.block_q * grid.block_kv * grid.batch * grid.heads
    if any_allowed.sum() > FEW_BLOCKS or scores > FEW_SCORES:
        return None
    kv_blocks = np.broadcast_to(grid.kv_blocks, any_allowed.shape)
    return tuple(
        tuple((int(kv_blocks[i, n]), not all_allowed[i, n]) for n in np.flatnonzero(any_allowed[i]))
        for i in range(len(any_allowed))
    )


def _summarize(mask: Mask | None, grid: BlockGrid):
    """Return which blocks are not empty, and which are full, (B or 1, H or 1, Q, S)."""
    count, width = grid.num_blocks
    any_allowed: Any = np.ones((1, 1, count, grid.kv_blocks.shape[1]), bool)
    all_allowed: Any = any_allowed
    if mask is not None:
        any_allowed, all_allowed = summarize_blocks(mask, grid)
    if grid.num_keys % grid.block_kv:  # the last block is padded, and padding is masked
        all_allowed = all_allowed & (grid.kv_blocks < width - 1)[None, None]
    return any_allowed, all_allowed & any_allowed


def _share_lists(any_allowed, all_allowed, grid: BlockGrid) -> tuple[Any, Any]:
    """Return blocks shared by all rows, or all heads, where a loop over them would not pay."""
    scores = grid.block_q * grid.block_kv
    mesh = jax.sharding.get_abstract_mesh()
    is_auto = any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)
    for axis, size in ((1, scores), (0, scores * grid.heads)):
        if is_auto or size < MIN_SCORES:
            any_allowed = any_allowed.any(axis, keepdims=True)
            all_allowed = all_allowed.all(axis, keepdims=True)
    return any_allowed, all_allowed


def _without_repeats(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return arrays with one row, or one head, if all rows or all heads are equal."""
    for axis in (0, 1):
        if all((x == x.take([0], axis)).all() for x in arrays):
            arrays = tuple(x.take([0], axis) for x in arrays)
    return list(arrays)


def _to_lists(flags, band) -> list[Any]:
    """Return the number of set flags along the last axis, and their indices, then the others."""
    xp: Any = np if isinstance(flags, np.ndarray) else jnp
    indices = xp.argsort(~flags, axis=-1, stable=True)
    if band is not None:
        indices = indices + band[1][None, None, :, None]
    return [flags.sum(-1).astype(np.int32), indices.astype(np.int32)]


def _transpose(flags, band, num_kv_blocks: int):
    """Return flags of the blocks of queries of each kv block, (B, H, S, N), and their band.

    The band holds the first and the last block of queries whose own band contains the kv block.
    """
    if band is None:
        return flags.swapaxes(-1, -2), None
    kv_blocks, num_q_blocks = band[1][:, None] + np.arange(band[0]), flags.shape[2]
    q_blocks = np.broadcast_to(np.arange(num_q_blocks)[:, None], kv_blocks.shape)
    first, last = np.full(num_kv_blocks, num_q_blocks - 1), np.zeros(num_kv_blocks, int)
    np.minimum.at(first, kv_blocks, q_blocks)
    np.maximum.at(last, kv_blocks, q_blocks)
    width = max(1, (last - first).max().item() + 1)
    first = np.minimum(first, num_q_blocks - width)
    q_block = first[:, None] + np.arange(width)
    column = np.arange(num_kv_blocks)[:, None] - band[1][q_block]
    inside = (column >= 0) & (column < band[0])
    return flags[:, :, q_block, np.where(inside, column, 0)] & inside[None, None], (width, first)
