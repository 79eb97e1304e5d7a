"""Splash attention, JAX's block-sparse flash attention for TPUs, with what it lacks.

What it lacks (jax.experimental.pallas.ops.tpu.splash_attention) is done here: batch, rows without keys, a
log-sum-exp with a gradient, masks known only when run inside of `jit`. Importing this brings Pallas along.
"""

from collections.abc import Hashable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_tiles
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention.backends import vjp as cotangents
from attnlab.attention.block_mask import depends_on
from attnlab.attention.masks.base import BlockGrid, Mask
from attnlab.attention.pairwise import eval_at_trace_time, pair_indices

Pair = tuple[int, int]
Kernel = splash.SplashAttentionKernel
_NO_TILES = splash_tiles.MaskInfo(None, None, None, None, None)


def known(mask: Mask | None, heads: int, lengths: Pair, tile: Pair, **options) -> Kernel | None:
    """The kernel of a mask that is known now; None where it allows nothing, which it would stumble over.

    Args:
      mask: the same in every row of the batch; None is all pairs of these lengths.
      heads: of queries.
      lengths: of queries and keys.
      tile: queries and keys of one; the arrays that the kernel gets are whole tiles.
      options: see `_options`.
    """
    differ = mask is not None and depends_on(mask)[1]

    def make():
        leaves, structure = jax.tree.flatten(mask)
        arrays = [np.asarray(x) for x in leaves]
        content = structure, tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays)
        each = [_Head(mask, content, head if differ else 0, lengths, tile) for head in range(heads)]
        if all(head.is_empty() for head in dict.fromkeys(each)):
            return None
        return splash.make_splash_mha(
            splash_masks.MultiHeadMask(each), head_shards=1, q_seq_shards=1, **_options(tile, **options)
        )

    return eval_at_trace_time(make)


def unknown(tile: Pair, **options) -> Kernel:
    """The kernel of masks that `attention` gets as arrays; the rest as in `known`."""
    return Kernel(_NO_TILES, None, None, is_mqa=False, mask_function=None, **_options(tile, **options))


def ids(queries: Int[Array, "b T"], keys: Int[Array, "b S"], batch: int, lengths: Pair) -> splash.SegmentIds:
    """Numbers that are equal where two segments are; those of padding, up to these lengths, equal none."""

    def numbers(x, length, padding):
        x = jnp.pad(jnp.where(x > 0, x, padding), ((0, 0), (0, length - x.shape[1])), constant_values=padding)
        return jnp.broadcast_to(x, (batch, length)).astype(jnp.int32)

    return splash.SegmentIds(numbers(queries, lengths[0], -1), numbers(keys, lengths[1], -2))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    kernel: Kernel,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S Dv"],
    ids: splash.SegmentIds | None,
    allowed: Bool[Array, "*B H T S"] | None,
) -> tuple[Float[Array, "B H T Dv"], Float[Array, "B H T"]]:
    """Output and log-sum-exp.

    Args:
      kernel: of `known`, or of `unknown`.
      query: (B, H, T, D), scaled; T whole tiles.
      key: (B, K, S, D), H a multiple of K; S whole tiles.
      value: (B, K, S, Dv).
      ids: of `ids`.
      allowed: what an unknown mask allows, (H or 1, T, S), or (B, H or 1, T, S) where rows differ.
    """
    return _forward(kernel, query, key, value, ids, allowed)[0]


def _forward(kernel, query, key, value, ids, allowed):
    def one(query, key, value, ids, allowed):
        return _with_tiles(kernel, allowed)(query, key, value, ids)

    out, (lse,) = jax.vmap(one, (0, 0, 0, 0, _axis(allowed)))(query, key, value, ids, allowed)
    # Of a row without keys the kernel makes the mean of the values of the tiles that it visits, or 0 / 0.
    empty = lse < kernel.kwargs["mask_value"] / 2
    out, lse = jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)
    return (out, lse), (query, key, value, ids, allowed, out, lse)


def _backward(kernel, residuals, given):
    query, key, value, ids, allowed, out, lse = residuals
    d_out, d_lse = given
    # JAX's own rule for the kernel leaves d_lse out, so its two backward kernels are called from here.
    delta = cotangents.delta(out, d_out, d_lse)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)  # beside which a masked score has weight 0
    sizes, options = kernel.kwargs["block_sizes"], kernel.kwargs
    common = {
        **{name: options[name] for name in ("is_mqa", "mask_value", "attn_logits_soft_cap")},
        **{name: options[name] for name in ("mask_function", "interpret")},
        **{name: getattr(sizes, name) for name in ("q_layout", "k_layout", "v_layout")},
    }
    to_queries = partial(
        splash._splash_attention_bwd_dq, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, **common
    )
    to_keys = partial(
        splash._splash_attention_bwd_dkv,
        **{"bq": sizes.block_q_dkv, "bkv": sizes.block_kv_dkv, "bkv_compute": sizes.block_kv_dkv_compute},
        use_fused_bwd_kernel=False,
        **common,
    )

    def one(q, k, v, ids, allowed, norm, g, minus):
        tiles = _with_tiles(kernel, allowed)
        arrays = q, k, v, ids, None, norm, g, minus
        _, d_key, d_value = to_keys(*arrays, mask_info=tiles.dkv_mask_info)
        return to_queries(*arrays, mask_info=tiles.dq_mask_info), d_key, d_value

    rows = jax.vmap(one, (0, 0, 0, 0, _axis(allowed), 0, 0, 0))
    gradients = rows(query, key, value, ids, allowed, lse, d_out, delta)
    return *gradients, cotangents.nothing(ids), cotangents.nothing(allowed)


attention.defvjp(_forward, _backward)


def _options(tile: Pair, softcap: float | None, interpret: bool) -> dict:
    """How a kernel runs, whatever its mask."""
    q, k = tile
    part = k // 2 if k > 512 and k % 256 == 0 else k  # so many keys at a time, of those that lie ready
    return {
        "block_sizes": splash.BlockSizes(q, k, part, q, k, part, q, k),
        "save_residuals": True,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": softcap,
        "residual_checkpoint_name": None,
        "interpret": interpret,
    }


def _axis(allowed: Array | None) -> int | None:
    """The dimension of `allowed` in which rows of the batch differ."""
    return 0 if allowed is not None and allowed.ndim == 4 else None


def _with_tiles(kernel: Kernel, allowed: Bool[Array, "H T S"] | None) -> Kernel:
    """The kernel with the tiles of a mask that it was made without."""
    if allowed is None:
        return kernel
    sizes = kernel.kwargs["block_sizes"]
    tile = sizes.block_q, sizes.block_kv

    def ready(tiles):
        blocks = tiles.partial_mask_blocks
        # The kernel asks whether they are known of a number that within `jit` is not; None is no.
        return tiles._replace(
            partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]), is_dynamic_mask=None
        )

    to_queries = ready(splash_tiles.process_dynamic_mask(allowed, tile)[0])
    to_keys = ready(splash_tiles.process_dynamic_mask_dkv(allowed, tile)[0])
    return Kernel(to_queries, to_queries, to_keys, **kernel.kwargs)


class _Head(splash_masks.Mask):
    """What one head of a mask allows, in whole tiles; keys beyond the last are allowed to none.

    Of equal `content`, all else the same, they are equal: JAX prepares the tiles once for all layers.
    """

    def __init__(self, mask: Mask | None, content: Hashable, head: int, lengths: Pair, tile: Pair):
        self.mask, self.head, self.num_keys, self.tile = mask, head, lengths[1], tile
        self._shape = tuple(-(-n // size) * size for n, size in zip(lengths, tile, strict=True))
        self._key = content, head, lengths, tile

    @property
    def shape(self):
        return self._shape

    def __eq__(self, other):
        return isinstance(other, _Head) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @cached_property
    def _whole(self) -> Mask:
        """The mask cut to this head, with keys and queries up to a whole tile."""
        assert self.mask is not None
        return self.mask.slice_block(heads=(self.head, 1)).pad_to(queries=self._shape[0], keys=self._shape[1])

    @cached_property
    def _tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each tile, whether it may allow some pair, and whether it allows every one."""
        (rows, columns), (queries, keys) = self.tile, self._shape
        grid = BlockGrid(queries, keys, rows, columns, offset=(0, self.head, 0, 0))
        some = every = np.ones(grid.num_blocks, bool)
        if self.mask is not None:
            some, every = (np.asarray(x)[0, 0] for x in self._whole.block_summary(grid))
        ends = columns + np.arange(0, keys, columns)
        return some, every & (ends <= self.num_keys)[None, :]

    def __getitem__(self, at):
        """The pairs of a tile, (queries, keys)."""
        q, k = (np.arange(part.start, part.stop) for part in at)
        i, j = q[0] // self.tile[0], k[0] // self.tile[1]
        some, every = (x[i, j] for x in self._tiles)
        if not some or every:
            return np.broadcast_to(every, (len(q), len(k)))
        allowed = (k < self.num_keys)[None, :]
        if self.mask is not None:
            part = self._whole.slice_block(queries=(q[0], len(q)), keys=(k[0], len(k)))
            allowed = allowed & np.asarray(part.evaluate(pair_indices(1, np.array([self.head]), q, k)))[0, 0]
        return np.broadcast_to(allowed, (len(q), len(k)))

    def is_empty(self) -> bool:
        """Whether no pair at all is allowed."""
        rows, columns = self.tile
        visits = zip(*np.nonzero(self._tiles[0]), strict=True)
        tiles = (self[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] for i, j in visits)
        return not any(tile.any() for tile in tiles)
