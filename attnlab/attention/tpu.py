"""Splash attention, JAX's kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention), as a backend.

It is block-sparse flash attention: the mask is cut into tiles when the program is traced, and empty ones
are never visited. What it lacks is done here: batch, scale, lengths that are no multiple of 128, rows
without keys, a log-sum-exp with a gradient.
"""

from collections.abc import Hashable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jaxtyping import Array, Int

from attnlab.attention import cotangents
from attnlab.attention.backends import Request, Result, beyond_softmax, sharded_length, with_sinks
from attnlab.attention.masks import And, Grid, Mask
from attnlab.attention.patterns import Segments
from attnlab.attention.plan import depends_on, equal_part, is_traced
from attnlab.attention.scores import Softcap
from attnlab.attention.values import now, pairs

Pair = tuple[int, int]
LANES = 128  # of a TPU's vector registers: tiles are made of so many queries and keys


class Splash:
    """Masks known when compiled, segments, a softcap and sinks, in memory linear in the length.

    Attributes:
      tile: the most queries and keys of a tile; None is what fits a TPU's vector memory.
      interpret: run the kernel as a plain JAX program, on any platform.
    """

    name = "splash"

    def __init__(self, tile: int | None = None, interpret: bool = False):
        self.tile, self.interpret = tile, interpret

    def refuse(self, request):
        """See `Backend.refuse`."""
        r = request
        if r.platform != "tpu" and not self.interpret:
            return f"it is for TPUs, and this is for a {r.platform.upper()}"
        if reason := sharded_length(r) or beyond_softmax(r):
            return reason
        dtypes = {x.dtype.name for x in (r.query, r.key, r.value)}
        if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
            return f"it takes bfloat16 or float32, the same for all three, not {', '.join(sorted(dtypes))}"
        if min(r.query.shape[1], r.key.shape[1]) < LANES:
            return f"its smallest tile is {LANES} queries by {LANES} keys"
        if r.score is not None and not (
            isinstance(r.score, Softcap) and isinstance(r.score.cap, int | float)
        ):
            return "it changes scores by softcap(number) alone"
        return _refuse_mask(r)

    def run(self, request, first):
        """See `Backend.run`."""
        del first  # what a mask would need it for has been refused
        r = request
        segments, mask = _split(r.mask)
        kernel = _kernel(r, mask, self.tile or _most(r), self.interpret)
        if kernel is None:
            rows = r.query.shape[:3]
            out, lse = jnp.zeros((*rows, r.value.shape[-1]), r.value.dtype), jnp.full(rows, -jnp.inf)
        else:
            query = (r.query * r.scale).astype(r.query.dtype)
            q_tile, k_tile = kernel.kwargs["block_sizes"].block_q, kernel.kwargs["block_sizes"].block_kv
            arrays = _laid_out(query, q_tile), _laid_out(r.key, k_tile), _laid_out(r.value, k_tile)
            ids = None if segments is None else _ids(segments, len(query), q_tile, k_tile)
            out, lse = _attend(kernel, *arrays, ids)
            out, lse = (jnp.swapaxes(x, 1, 2)[:, : query.shape[1]] for x in (out, lse))
        return Result(*(out, lse) if r.sinks is None else with_sinks(out, lse, r.sinks))


def _refuse_mask(r: Request) -> str | None:
    """Why the mask cannot be cut into tiles while the program is traced."""
    _, mask = _split(r.mask)
    if mask is None:
        return None
    if is_traced(mask):
        return "the mask has arrays beside its segments that are known only when run"
    rows, heads = depends_on(mask, r.query.shape[0], r.query.shape[2])
    if rows:
        return "the mask, its segments aside, differs between rows of the batch"
    if heads and r.is_part:
        return "the mask differs between heads, and which heads a device has is known only when run"
    return None


def _split(mask: Mask | None) -> tuple[Segments | None, Mask | None]:
    """The segments that are one side of an `And` at the top of a mask, and the rest of it."""
    if isinstance(mask, Segments):
        return mask, None
    if isinstance(mask, And):
        for one, other in ((mask.left, mask.right), (mask.right, mask.left)):
            segments, rest = _split(one)
            if segments is not None:
                return segments, other if rest is None else rest & other
    return None, mask


def _most(r: Request) -> int:
    """Queries and keys of a tile such that all three kernels compile within 16 MiB of vector memory."""
    wide = max(r.query.shape[-1], r.value.shape[-1]) > 128 or r.query.dtype == jnp.float32
    return 512 if wide else 1024


def _tile(length: int, most: int) -> int:
    """The size of equal tiles that are at most so long."""
    return -(-equal_part(length, most) // LANES) * LANES


def _laid_out(x: Array, tile: int) -> Array:
    """(B, T, H, D) as (B, H, T', D), T' a whole number of tiles."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % tile), (0, 0)))


def _ids(segments: Segments, batch: int, q_tile: int, k_tile: int) -> splash.SegmentIds:
    """Numbers that are equal where a pair may attend; those of padding are equal to none."""

    def numbers(x: Int[Array, "B T"], tile: int, padding: int):
        x = jnp.pad(jnp.where(x > 0, x, padding), ((0, 0), (0, -x.shape[1] % tile)), constant_values=padding)
        return jnp.broadcast_to(x, (batch, x.shape[1])).astype(jnp.int32)

    return splash.SegmentIds(numbers(segments.queries, q_tile, -1), numbers(segments.keys, k_tile, -2))


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
        return self.mask.cut(heads=(self.head, 1)).pad(queries=self._shape[0], keys=self._shape[1])

    @cached_property
    def _tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each tile, whether it may allow some pair, and whether it allows every one."""
        (rows, columns), (queries, keys) = self.tile, self._shape
        grid = Grid(queries, keys, rows, columns, first=(0, self.head, 0, 0))
        some = every = np.ones(grid.counts, bool)
        if self.mask is not None:
            some, every = (np.asarray(x)[0, 0] for x in self._whole.tiles(grid))
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
            part = self._whole.cut(queries=(q[0], len(q)), keys=(k[0], len(k)))
            allowed = allowed & np.asarray(part.block(pairs(1, np.array([self.head]), q, k)))[0, 0]
        return np.broadcast_to(allowed, (len(q), len(k)))

    def is_empty(self) -> bool:
        """Whether no pair at all is allowed."""
        rows, columns = self.tile
        visits = zip(*np.nonzero(self._tiles[0]), strict=True)
        tiles = (self[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] for i, j in visits)
        return not any(tile.any() for tile in tiles)


def _kernel(r: Request, mask: Mask | None, most: int, interpret: bool) -> splash.SplashAttentionKernel | None:
    """The kernel for a mask; None where it allows nothing, which the kernel would stumble over."""
    lengths = r.query.shape[1], r.key.shape[1]
    q, k = tile = _tile(lengths[0], most), _tile(lengths[1], most)
    differ = mask is not None and depends_on(mask, r.query.shape[0], r.query.shape[2])[1]
    part = k // 2 if k > 512 and k % (2 * LANES) == 0 else k
    sizes = splash.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=part,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=part,
        block_q_dq=q,
        block_kv_dq=k,
    )

    def make():
        leaves, structure = jax.tree.flatten(mask)
        arrays = [np.asarray(x) for x in leaves]
        content = structure, tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays)
        count = r.query.shape[2]
        heads = [_Head(mask, content, head if differ else 0, lengths, tile) for head in range(count)]
        if all(head.is_empty() for head in dict.fromkeys(heads)):
            return None
        return splash.make_splash_mha(
            splash_masks.MultiHeadMask(heads),
            block_sizes=sizes,
            save_residuals=True,
            attn_logits_soft_cap=r.score.cap if isinstance(r.score, Softcap) else None,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

    return now(make)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, query, key, value, ids):
    """Output and log-sum-exp, (B, H, T, ...)."""
    return _forward(kernel, query, key, value, ids)[0]


def _forward(kernel, query, key, value, ids):
    out, (lse,) = jax.vmap(kernel)(query, key, value, ids)
    # Of a row without keys the kernel makes the mean of the values of the tiles that it visits, or 0 / 0.
    empty = lse < kernel.kwargs["mask_value"] / 2
    out, lse = jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)
    return (out, lse), (query, key, value, ids, out, lse)


def _backward(kernel, residuals, given):
    query, key, value, ids, out, lse = residuals
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
        splash._splash_attention_bwd_dq,
        **{"bq": sizes.block_q_dq, "bkv": sizes.block_kv_dq, "mask_info": kernel.dq_mask_info},
        **common,
    )
    to_keys = partial(
        splash._splash_attention_bwd_dkv,
        **{"bq": sizes.block_q_dkv, "bkv": sizes.block_kv_dkv, "bkv_compute": sizes.block_kv_dkv_compute},
        **{"mask_info": kernel.dkv_mask_info, "use_fused_bwd_kernel": False},
        **common,
    )

    def one(q, k, v, ids, norm, g, minus):
        arrays = q, k, v, ids, None, norm, g, minus
        _, d_key, d_value = to_keys(*arrays)
        return to_queries(*arrays), d_key, d_value

    return (*jax.vmap(one)(query, key, value, ids, lse, d_out, delta), cotangents.nothing(ids))


_attend.defvjp(_forward, _backward)
