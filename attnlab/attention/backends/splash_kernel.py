"""Splash attention, JAX's block-sparse flash attention kernel for TPUs, with extensions.

This module adds a batch dimension, rows without keys, a differentiable log-sum-exp and dynamic
masks inside `jit` to jax.experimental.pallas.ops.tpu.splash_attention. Importing it imports Pallas.
"""

from collections.abc import Hashable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask_info
from jaxtyping import Array, Bool, Float

from attnlab.attention.arrays import eval_at_trace_time, named_output
from attnlab.attention.backends import vjp
from attnlab.attention.backends.tpu_layout import Pair
from attnlab.attention.masks.base import BlockGrid, Mask
from attnlab.attention.masks.basic import NormalForm, depends_on_batch_and_heads
from attnlab.attention.pairwise import pair_indices

Kernel = splash.SplashAttentionKernel
_NO_BLOCKS = splash_mask_info.MaskInfo(None, None, None, None, None)


def static_kernel(
    mask: Mask | None, heads: int, lengths: Pair, block_sizes: Pair, **options
) -> Kernel | None:
    """Return the kernel of a static mask, or None if it allows no pair, which JAX rejects.

    Args:
      mask: a static mask, the same for every batch row. None allows every pair.
      heads: number of query heads.
      lengths: numbers of queries and keys.
      block_sizes: block_q and block_kv. The kernel's inputs are padded to multiples of these.
      options: see `_options`.
    """
    differs_by_head = mask is not None and depends_on_batch_and_heads(mask)[1]

    def make():
        leaves, structure = jax.tree.flatten(mask)
        arrays = [np.asarray(x) for x in leaves]
        content = structure, tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays)
        head_masks = [
            _HeadMask(mask, content, head if differs_by_head else 0, lengths, block_sizes)
            for head in range(heads)
        ]
        if all(head.is_empty() for head in dict.fromkeys(head_masks)):
            return None
        return splash.make_splash_mha(
            splash_masks.MultiHeadMask(head_masks),
            head_shards=1,
            q_seq_shards=1,
            **_options(block_sizes, **options),
        )

    return eval_at_trace_time(make)


def dynamic_kernel(block_sizes: Pair, **options) -> Kernel:
    """Return the kernel for a mask that `attention` gets as an array; see `static_kernel`."""
    return Kernel(
        _NO_BLOCKS, None, None, is_mqa=False, mask_function=None, **_options(block_sizes, **options)
    )


def segment_ids(form: NormalForm, batch: int, lengths: Pair, padded: Pair) -> splash.SegmentIds | None:
    """Return the segments and lengths of a mask as segment ids for the kernel; None without any.

    Padding has id -1 for queries and -2 for keys, so that it matches nothing.

    Args:
      form: its `segments` and `lengths` are used.
      batch: number of rows B.
      lengths: numbers of queries and keys.
      padded: the lengths of the ids.
    """
    if form.segments is None and form.lengths is None:
        return None
    segments, limits = form.segments, form.lengths

    def ids(ids_of_segments, limit, length, padded_length, padding):
        x = jnp.ones((1, length), jnp.int32) if ids_of_segments is None else ids_of_segments
        if limit is not None:
            x = jnp.where(jnp.arange(length)[None] < jnp.reshape(limit, (-1, 1)), x, 0)
        x = jnp.pad(
            jnp.where(x > 0, x, padding), ((0, 0), (0, padded_length - length)), constant_values=padding
        )
        return jnp.broadcast_to(x, (batch, padded_length)).astype(jnp.int32)

    queries, keys = (None, None) if segments is None else (segments.queries, segments.keys)
    num_queries, num_keys = (None, None) if limits is None else (limits.queries, limits.keys)
    return splash.SegmentIds(
        ids(queries, num_queries, lengths[0], padded[0], -1), ids(keys, num_keys, lengths[1], padded[1], -2)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    kernel: Kernel,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S Dv"],
    ids: splash.SegmentIds | None,
    allowed: Bool[Array, "*B H T S"] | None,
) -> tuple[Float[Array, "B H T Dv"], Float[Array, "B H T"]]:
    """Return output and log-sum-exp.

    Args:
      kernel: from `static_kernel` or `dynamic_kernel`.
      query: scaled, (B, H, T, D). T is a multiple of block_q.
      key: (B, K, S, D). H is a multiple of K and S of block_kv.
      value: (B, K, S, Dv).
      ids: from `segment_ids`.
      allowed: the mask of a dynamic kernel, (H or 1, T, S), or (B, H or 1, T, S) if rows differ.
    """
    return forward(kernel, query, key, value, ids, allowed)


def _forward(kernel, query, key, value, ids, allowed):
    out, lse = named_output(*forward(kernel, query, key, value, ids, allowed))
    return (out, lse), (query, key, value, ids, allowed, out, lse)


def forward(kernel: Kernel, query, key, value, ids, allowed):
    """Return the result of `attention`, whose gradients JAX cannot compute."""

    def forward_row(query, key, value, ids, allowed):
        return _with_mask_info(kernel, allowed)(query, key, value, ids)

    forward_rows = jax.vmap(forward_row, (0, 0, 0, 0, _batch_axis(allowed)))
    out, (lse,) = forward_rows(query, key, value, ids, allowed)
    # For a query without keys, the kernel returns the mean of the values of its blocks, or 0 / 0.
    empty = lse < kernel.kwargs["mask_value"] / 2
    return jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)


def _backward(kernel, residuals, d_outputs):
    query, key, value, ids, allowed, out, lse = residuals
    d_out, d_lse = d_outputs
    # JAX's own VJP of the kernel ignores d_lse, so this calls its two backward kernels directly.
    delta = vjp.row_term(out, d_out, d_lse)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)  # masked scores then have weight 0
    grads = gradients(kernel, query, key, value, d_out, lse, delta, ids, allowed)
    return *grads, vjp.zero_cotangent(ids), vjp.zero_cotangent(allowed)


def gradients(kernel: Kernel, query, key, value, d_out, lse, delta, ids, allowed):
    """Return the gradients of query, key and value, given a finite log-sum-exp of all keys.

    Args:
      kernel: as in `attention`.
      query: as in `attention`.
      key: as in `attention`.
      value: as in `attention`.
      d_out: gradient of the output, (B, H, T, Dv).
      lse: log-sum-exp over all keys, including those that are not in `key`, (B, H, T).
      delta: `vjp.row_term` of the output over all keys, (B, H, T).
      ids: as in `attention`.
      allowed: as in `attention`.
    """
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

    def backward_row(q, k, v, ids, allowed, lse, d_out, delta):
        masked = _with_mask_info(kernel, allowed)
        arrays = q, k, v, ids, None, lse, d_out, delta
        _, d_key, d_value = to_keys(*arrays, mask_info=masked.dkv_mask_info)
        return to_queries(*arrays, mask_info=masked.dq_mask_info), d_key, d_value

    backward_rows = jax.vmap(backward_row, (0, 0, 0, 0, _batch_axis(allowed), 0, 0, 0))
    return backward_rows(query, key, value, ids, allowed, lse, d_out, delta)


attention.defvjp(_forward, _backward)


def _options(block_sizes: Pair, softcap: float | None, interpret: bool) -> dict:
    """Return the options of a kernel that do not depend on its mask."""
    block_q, block_kv = block_sizes
    # The number of keys of a block in VMEM that the kernel computes at a time.
    compute = block_kv // 2 if block_kv > 512 and block_kv % 256 == 0 else block_kv
    return {
        "block_sizes": splash.BlockSizes(
            *(block_q, block_kv, compute), *(block_q, block_kv, compute), block_q, block_kv
        ),
        "save_residuals": True,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": softcap,
        "residual_checkpoint_name": None,
        "interpret": interpret,
    }


def _batch_axis(allowed: Array | None) -> int | None:
    """Return the `vmap` axis of `allowed`: 0 if it has a batch dimension, None otherwise."""
    return 0 if allowed is not None and allowed.ndim == 4 else None


def _with_mask_info(kernel: Kernel, allowed: Bool[Array, "H T S"] | None) -> Kernel:
    """Return a dynamic kernel with the blocks of its mask; a static kernel unchanged."""
    if allowed is None:
        return kernel
    sizes = kernel.kwargs["block_sizes"]
    block_sizes = sizes.block_q, sizes.block_kv

    def flatten_blocks(mask_info):
        blocks = mask_info.partial_mask_blocks
        # The kernel branches on `is_dynamic_mask`, a tracer under `jit`. None counts as False.
        return mask_info._replace(
            partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]), is_dynamic_mask=None
        )

    to_queries = flatten_blocks(splash_mask_info.process_dynamic_mask(allowed, block_sizes)[0])
    to_keys = flatten_blocks(splash_mask_info.process_dynamic_mask_dkv(allowed, block_sizes)[0])
    return Kernel(to_queries, to_queries, to_keys, **kernel.kwargs)


class _HeadMask(splash_masks.Mask):
    """The mask of one head, padded to whole blocks. Padded keys are masked.

    Masks of equal `content`, head, lengths and block sizes compare equal, so that JAX builds their
    blocks only once for all layers.
    """

    def __init__(self, mask: Mask | None, content: Hashable, head: int, lengths: Pair, block_sizes: Pair):
        self.mask, self.head, self.num_keys, self.block_sizes = mask, head, lengths[1], block_sizes
        self._shape = tuple(-(-n // size) * size for n, size in zip(lengths, block_sizes, strict=True))
        self._key = content, head, lengths, block_sizes

    @property
    def shape(self):
        return self._shape

    def __eq__(self, other):
        return isinstance(other, _HeadMask) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @cached_property
    def _padded_mask(self) -> Mask:
        """The mask sliced to this head, with queries and keys padded to whole blocks."""
        assert self.mask is not None
        return self.mask.slice_block(heads=(self.head, 1)).pad_to(queries=self._shape[0], keys=self._shape[1])

    @cached_property
    def _block_summary(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether each block may allow any pair, and whether it allows all pairs."""
        (block_q, block_kv), (queries, keys) = self.block_sizes, self._shape
        grid = BlockGrid(queries, keys, block_q, block_kv, offset=(0, self.head, 0, 0))
        any_allowed = all_allowed = np.ones(grid.num_blocks, bool)
        if self.mask is not None:
            any_allowed, all_allowed = (np.asarray(x)[0, 0] for x in self._padded_mask.block_summary(grid))
        ends = block_kv + np.arange(0, keys, block_kv)
        return any_allowed, all_allowed & (ends <= self.num_keys)[None, :]

    def __getitem__(self, at):
        """Return the allowed pairs of a block, (queries, keys)."""
        q, k = (np.arange(part.start, part.stop) for part in at)
        i, j = q[0] // self.block_sizes[0], k[0] // self.block_sizes[1]
        any_allowed, all_allowed = (x[i, j] for x in self._block_summary)
        if not any_allowed or all_allowed:
            return np.broadcast_to(all_allowed, (len(q), len(k)))
        allowed = (k < self.num_keys)[None, :]
        if self.mask is not None:
            part = self._padded_mask.slice_block(queries=(q[0], len(q)), keys=(k[0], len(k)))
            allowed = allowed & np.asarray(part.evaluate(pair_indices(1, np.array([self.head]), q, k)))[0, 0]
        return np.broadcast_to(allowed, (len(q), len(k)))

    def is_empty(self) -> bool:
        """Return whether the mask allows no pair."""
        block_q, block_kv = self.block_sizes
        indices = zip(*np.nonzero(self._block_summary[0]), strict=True)
        blocks = (
            self[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv] for i, j in indices
        )
        return not any(block.any() for block in blocks)
