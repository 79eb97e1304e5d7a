"""KV caches: keys and values of tokens already processed, as immutable pytrees.

`KVCache` is the contiguous cache of one layer. `DecoderCache` is the cache of a whole decoder,
which generation uses. `RollingKVCache`, `PagedKVCache` and `QuantizedKVCache` are alternatives for
one layer: `write` returns a cache with more tokens, `read` returns the keys and values of its
slots, and `mask` returns the mask of queries at given positions over these slots, so that

    cache = cache.write(start, key, value)
    out = attend(query, *cache.read(query.dtype), mask=cache.mask(start, query.shape[1]))

is causal attention over all tokens that the cache still holds.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.masks.basic import causal
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, (B, S, K, D), or of L scanned layers, (L, B, S, K, D)."""

    key: Float[Array, "*L B S K D"]
    value: Float[Array, "*L B S K D"]

    def write(self, start: Index, key: Array, value: Array) -> "KVCache":
        """Return the cache with new keys and values in the slots from `start` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        return KVCache(
            put(self.key, key.astype(self.key.dtype), start, axis=1),
            put(self.value, value.astype(self.value.dtype), start, axis=1),
        )

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "KVCache":
        """Return a cache of zeros for one layer."""
        shape = (batch, slots, kv_heads, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def map_rows(self, function: Callable[[Array], Array]) -> "KVCache":
        """Apply a function of (B, ...) arrays to keys and values, layer by layer."""
        for _ in range(self.key.ndim - 4):
            function = jax.vmap(function)
        return KVCache(function(self.key), function(self.value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderCache:
    """KV caches of a decoder's layers. All rows fill the same slot; rows are left-padded.

    Attributes:
      layers: a pytree of `KVCache` that the model defines.
      segments: 1 for slots that hold a token, 0 for padding and empty slots, (B, S).
      index: the next slot to fill.
      context: inputs other than the decoder's own tokens, such as an encoder's output: a pytree of
        `KVCache` and of arrays whose first axis is the batch.
    """

    layers: Any
    segments: Int[Array, "B S"]
    index: Int[Array, ""]
    context: Any = None

    @property
    def row_starts(self) -> Int[Array, " B"]:
        """Return the slot of the first token of each row."""
        return jnp.argmax(self.segments > 0, axis=1)

    def advance(self, segments: Int[Array, "B T"]) -> "DecoderCache":
        """Return the cache with the slots of T new tokens marked, before their keys are written."""
        marked = jax.lax.dynamic_update_slice_in_dim(self.segments, segments, self.index, axis=1)
        return dataclasses.replace(self, segments=marked, index=self.index + segments.shape[1])

    def rewind(self, count: Index) -> "DecoderCache":
        """Return the cache without the last `count` tokens of every row.

        Their slots are overwritten by the next tokens.
        """
        index = self.index - count
        before = jnp.arange(self.segments.shape[1])[None] < index
        return dataclasses.replace(self, segments=jnp.where(before, self.segments, 0), index=index)

    def gather_rows(self, rows: Int[Array, "G N"]) -> "DecoderCache":
        """Return the cache with N rows per group, selected by their index within the group.

        The batch consists of G groups of equal size. A row may be selected more than once. A group
        that is on one device stays on it.
        """

        def gather(x: Array) -> Array:
            return gather_rows(x, rows)

        layers, segments, context = map_rows(gather, (self.layers, self.segments, self.context))
        return dataclasses.replace(self, layers=layers, segments=segments, context=context)


def map_rows(function: Callable[[Array], Array], tree: Any) -> Any:
    """Apply a function of (B, ...) arrays to each array of a pytree of arrays and `KVCache`."""

    def apply(x):
        return x.map_rows(function) if isinstance(x, KVCache) else function(x)

    return jax.tree.map(apply, tree, is_leaf=lambda x: isinstance(x, KVCache))


def gather_rows(x: Array, rows: Int[Array, "G N"]) -> Array:
    """Return `rows` of each of the G equal groups of the first axis of `x`, (G * N, ...)."""
    groups, count = rows.shape
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    batch, *rest = jax.typeof(x).sharding.spec if in_mesh else (None,)
    # Explicit, since the reshape of a single row may lose its sharding.
    apart, together = (jax.P(batch, None, *rest), jax.P(batch, *rest)) if in_mesh else (None, None)
    x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:], out_sharding=apart)
    x = jax.vmap(lambda group, index: group[index])(x, rows)
    return x.reshape(groups * count, *x.shape[2:], out_sharding=together)


@pytree
class CachedPositionsMask(Mask):
    """Causal mask over cache slots, with an optional window.

    Allows the slots of tokens at most `window - 1` positions before the query and not after it.

    Attributes:
      query_positions: position of each query, (B or 1, T).
      key_positions: position of the token in each slot, -1 for an empty slot, (B or 1, S).
      window: number of positions that a query attends to, including its own. None for no limit.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    window: int | None = None

    dims = {"query_positions": ("batch", "queries"), "key_positions": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        q, k = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
        allowed = (k >= 0) & (k <= q)
        return allowed if self.window is None else allowed & (k > q - self.window)


@pytree
class RollingKVCache:
    """KV cache of sliding-window attention: new tokens overwrite the oldest (arXiv 2310.06825).

    Attributes:
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      positions: position of the token in each slot, -1 for an empty slot, (S,).
      window: number of positions that a query attends to, including its own.
    """

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K Dv"]
    positions: Int[Array, " S"]
    window: int

    @staticmethod
    def empty(batch: int, slots: int, window: int, kv_heads: int, head_dim: int, dtype) -> "RollingKVCache":
        """Return an empty cache. One `write` takes at most `slots - (window - 1)` tokens."""
        shape = (batch, slots, kv_heads, head_dim)
        return RollingKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(slots, -1), window)

    def write(self, start: Index, key: Array, value: Array) -> "RollingKVCache":
        """Return the cache with the tokens from position `start` on.

        Raises:
          InputError: The tokens would overwrite keys in the window of the first of them.
        """
        slots, count = len(self.positions), key.shape[1]
        if count + self.window - 1 > slots:
            raise InputError(
                f"a rolling KV cache of {slots} slots and window {self.window} takes at most "
                f"{slots - self.window + 1} tokens per write, not {count}"
            )
        positions = start + jnp.arange(count)

        def put(cache, new, axis):
            # Token i goes to slot (start + i) % slots. Each slot gathers its token, if any.
            index = (jnp.arange(slots) - start) % slots
            gathered = jnp.take(new, jnp.minimum(index, count - 1), axis=axis)
            shape = [-1 if i == axis else 1 for i in range(cache.ndim)]
            return jnp.where((index < count).reshape(shape), gathered.astype(cache.dtype), cache)

        return RollingKVCache(
            put(self.key, key, 1), put(self.value, value, 1), put(self.positions, positions, 0), self.window
        )

    def read(self, dtype) -> tuple[Array, Array]:
        """Return keys and values of all slots, (B, S, K, D)."""
        return self.key.astype(dtype), self.value.astype(dtype)

    def mask(self, start: Index, count: int) -> Mask:
        """Return the mask of the queries at positions `start` to `start + count - 1`."""
        return CachedPositionsMask((start + jnp.arange(count))[None], self.positions[None], self.window)


@pytree
class PagedKVCache:
    """KV cache in pages of a shared pool (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

    Attributes:
      key_pages: (pages, page size, K, D).
      value_pages: (pages, page size, K, Dv).
      page_table: page of each page-sized chunk of a row, -1 if none is assigned, (B, chunks).
      lengths: number of tokens in each row, (B,).
    """

    key_pages: Float[Array, "P N K D"]
    value_pages: Float[Array, "P N K Dv"]
    page_table: Int[Array, "B M"]
    lengths: Int[Array, " B"]

    @staticmethod
    def empty(
        page_table: Int[Array, "B M"], pages: int, page_size: int, kv_heads: int, head_dim: int, dtype
    ) -> "PagedKVCache":
        """Return an empty cache with the given page table."""
        shape = (pages, page_size, kv_heads, head_dim)
        return PagedKVCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            page_table,
            jnp.zeros(len(page_table), jnp.int32),
        )

    def write(self, key: Array, value: Array, counts: Int[Array, " B"] | None = None) -> "PagedKVCache":
        """Append T tokens to every row, or the first `counts` of them.

        Tokens without a page are dropped.
        """
        pages, size = self.key_pages.shape[:2]
        b, t = key.shape[:2]
        counts = jnp.full(b, t) if counts is None else counts
        position = self.lengths[:, None] + jnp.arange(t)[None, :]
        page = jnp.take_along_axis(
            self.page_table, jnp.minimum(position // size, self.page_table.shape[1] - 1), axis=1
        )
        fits = (jnp.arange(t)[None, :] < counts[:, None]) & (position // size < self.page_table.shape[1])
        page = jnp.where(fits & (page >= 0), page, pages)  # out of range, so that `mode="drop"` applies

        def put(cache, new):
            return cache.at[page, position % size].set(new.astype(cache.dtype), mode="drop")

        return PagedKVCache(
            put(self.key_pages, key), put(self.value_pages, value), self.page_table, self.lengths + counts
        )

    def read(self, dtype) -> tuple[Array, Array]:
        """Return keys and values gathered from the pages, (B, chunks * page size, K, D)."""

        def gather(cache):
            rows = jnp.take(cache, jnp.maximum(self.page_table, 0), axis=0)
            return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).astype(dtype)

        return gather(self.key_pages), gather(self.value_pages)

    def mask(self, count: int) -> Mask:
        """Return the mask of the last `count` tokens of every row."""
        slots = jnp.arange(self.page_table.shape[1] * self.key_pages.shape[1])[None, :]
        is_cached = (slots < self.lengths[:, None]) & (
            jnp.repeat(self.page_table, self.key_pages.shape[1], axis=1) >= 0
        )
        queries = self.lengths[:, None] - count + jnp.arange(count)[None, :]
        return CachedPositionsMask(queries, jnp.where(is_cached, slots, -1))


@pytree
class QuantizedKVCache:
    """KV cache in 8 bits, with one scale per token and head.

    Attributes:
      key: int8 or float8, (B, S, K, D).
      value: the same dtype, (B, S, K, Dv).
      key_scale: dequantization factor of each key, float32, (B, S, K, 1).
      value_scale: dequantization factor of each value, float32, (B, S, K, 1).
    """

    key: Array
    value: Array
    key_scale: Float[Array, "B S K 1"]
    value_scale: Float[Array, "B S K 1"]

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype=jnp.int8) -> "QuantizedKVCache":
        """Return an empty cache of an 8-bit dtype: int8, float8_e4m3fn, float8_e5m2 or another."""
        shape, scales = (batch, slots, kv_heads, head_dim), jnp.zeros((batch, slots, kv_heads, 1))
        return QuantizedKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales, scales)

    def write(self, start: Index, key: Array, value: Array) -> "QuantizedKVCache":
        """Return the cache with the tokens from position `start` on, quantized."""
        put = jax.lax.dynamic_update_slice_in_dim
        (key, key_scale), (value, value_scale) = (_quantize(x, self.key.dtype) for x in (key, value))
        caches = self.key, self.value, self.key_scale, self.value_scale
        new = key, value, key_scale, value_scale
        return QuantizedKVCache(*(put(cache, x, start, axis=1) for cache, x in zip(caches, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """Return dequantized keys and values of all slots, (B, S, K, D)."""
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return tuple((x.astype(jnp.float32) * scale).astype(dtype) for x, scale in pairs)  # type: ignore[return-value]

    def mask(self, start: Index, count: int) -> Mask:
        """Return the causal mask of the queries from position `start` on."""
        del count
        return causal(start)


def _quantize(x: Array, dtype) -> tuple[Array, Array]:
    """Quantize each vector by its largest absolute value; return also the dequantization factor."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    max_value = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max.astype(jnp.float32)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / max_value
    scaled = x / jnp.where(scale == 0, 1, scale)
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale
