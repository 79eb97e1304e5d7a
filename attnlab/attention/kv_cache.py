"""KV caches: keys and values of tokens already processed, as immutable pytrees.

`KVCache` is the contiguous cache of one layer and `DecoderCache` that of a whole decoder, which generation
uses. `RollingKVCache`, `PagedKVCache` and `QuantizedKVCache` are alternatives for one layer: `write` returns
a cache with more tokens, `read` the keys and values of its slots, and `mask` which of them the queries at
given positions may attend to, so that

    cache = cache.write(start, key, value)
    out = attend(query, *cache.read(query.dtype), mask=cache.mask(start, query.shape[1]))

is causal attention over all that was written, as far back as the cache reaches.
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
    """One layer's keys and values for every slot, (B, S, K, D); of scanned layers, (L, B, S, K, D)."""

    key: Float[Array, "*L B S K D"]
    value: Float[Array, "*L B S K D"]

    def write(self, start: Index, key: Array, value: Array) -> "KVCache":
        """With new keys and values in the slots from `start` on."""
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
        """With keys and values that a function makes of those of all rows, of each layer by itself."""
        for _ in range(self.key.ndim - 4):
            function = jax.vmap(function)
        return KVCache(function(self.key), function(self.value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderCache:
    """What a decoder has read: slots filled in step over the batch, rows padded on the left.

    Attributes:
      layers: a model's own arrangement of `KVCache`.
      segments: 1 where a slot holds a token, 0 where it is padding or empty, (B, S).
      index: the next slot to fill.
      context: what a decoder reads beside its own tokens, such as an encoder's output: any arrangement of
        `KVCache`, and of arrays that start with the batch axis.
    """

    layers: Any
    segments: Int[Array, "B S"]
    index: Int[Array, ""]
    context: Any = None

    @property
    def row_starts(self) -> Int[Array, " B"]:
        """The slot of each row's first token."""
        return jnp.argmax(self.segments > 0, axis=1)

    def advance(self, segments: Int[Array, "B T"]) -> "DecoderCache":
        """With the slots of T new tokens marked, before their keys are written."""
        marked = jax.lax.dynamic_update_slice_in_dim(self.segments, segments, self.index, axis=1)
        return dataclasses.replace(self, segments=marked, index=self.index + segments.shape[1])

    def rewind(self, count: Index) -> "DecoderCache":
        """Without the last `count` tokens of every row, whose slots will be written over."""
        index = self.index - count
        before = jnp.arange(self.segments.shape[1])[None] < index
        return dataclasses.replace(self, segments=jnp.where(before, self.segments, 0), index=index)

    def gather_rows(self, rows: Int[Array, "G N"]) -> "DecoderCache":
        """With other rows, where the batch is G groups: N of each, that may repeat, counted in the group.

        Groups that lie on one device stay there.
        """

        def gather(x: Array) -> Array:
            return gather_rows(x, rows)

        layers, segments, context = map_rows(gather, (self.layers, self.segments, self.context))
        return dataclasses.replace(self, layers=layers, segments=segments, context=context)


def map_rows(function: Callable[[Array], Array], tree: Any) -> Any:
    """A tree of `KVCache` and arrays that start with the batch axis, a function applied to each array."""

    def apply(x):
        return x.map_rows(function) if isinstance(x, KVCache) else function(x)

    return jax.tree.map(apply, tree, is_leaf=lambda x: isinstance(x, KVCache))


def gather_rows(x: Array, rows: Int[Array, "G N"]) -> Array:
    """`rows` of each of the G groups that the first axis of `x` is made of, (G * N, ...)."""
    groups, count = rows.shape
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    batch, *rest = jax.typeof(x).sharding.spec if in_mesh else (None,)
    # Said, for what is reshaped from a single row may lose its layout.
    apart, together = (jax.P(batch, None, *rest), jax.P(batch, *rest)) if in_mesh else (None, None)
    x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:], out_sharding=apart)
    x = jax.vmap(lambda group, index: group[index])(x, rows)
    return x.reshape(groups * count, *x.shape[2:], out_sharding=together)


@pytree
class CachedPositionsMask(Mask):
    """Slots that hold a token no later than the query, and at most `window - 1` before it.

    Attributes:
      query_positions: position of each query, (B or 1, T).
      key_positions: position of the token in each slot, -1 where there is none, (B or 1, S).
      window: how far back a query sees, itself included; None is no limit.
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
    """The last tokens only, each written over the one that the window leaves behind (arXiv 2310.06825).

    Attributes:
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      positions: the position of the token in each slot, -1 where there is none, (S,).
      window: how far back a query sees, itself included.
    """

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K Dv"]
    positions: Int[Array, " S"]
    window: int

    @staticmethod
    def empty(batch: int, slots: int, window: int, kv_heads: int, head_dim: int, dtype) -> "RollingKVCache":
        """An empty `RollingKVCache`; `slots` less `window - 1` tokens may be written at a time."""
        shape = (batch, slots, kv_heads, head_dim)
        return RollingKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(slots, -1), window)

    def write(self, start: Index, key: Array, value: Array) -> "RollingKVCache":
        """With the tokens from position `start` on.

        Raises:
          InputError: so many tokens at once that they would write over what the first of them sees.
        """
        slots, count = len(self.positions), key.shape[1]
        if count + self.window - 1 > slots:
            raise InputError(
                f"{slots} slots take {slots - self.window + 1} tokens at a time for a window of "
                f"{self.window}, not {count}"
            )
        positions = start + jnp.arange(count)

        def put(cache, new, axis):
            # Each slot takes the new token whose turn it is, if there is one.
            turn = (jnp.arange(slots) - start) % slots
            taken = jnp.take(new, jnp.minimum(turn, count - 1), axis=axis)
            shape = [-1 if i == axis else 1 for i in range(cache.ndim)]
            return jnp.where((turn < count).reshape(shape), taken.astype(cache.dtype), cache)

        return RollingKVCache(
            put(self.key, key, 1), put(self.value, value, 1), put(self.positions, positions, 0), self.window
        )

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of all slots."""
        return self.key.astype(dtype), self.value.astype(dtype)

    def mask(self, start: Index, count: int) -> Mask:
        """What the queries at `start` and the `count - 1` positions after it may attend to."""
        return CachedPositionsMask((start + jnp.arange(count))[None], self.positions[None], self.window)


@pytree
class PagedKVCache:
    """Pages of a pool that rows share out among themselves (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

    Attributes:
      key_pages: (pages, page size, K, D).
      value_pages: (pages, page size, K, Dv).
      page_table: the page of each stretch of a row, -1 where it has none yet, (B, stretches).
      lengths: tokens in each row, (B,).
    """

    key_pages: Float[Array, "P N K D"]
    value_pages: Float[Array, "P N K Dv"]
    page_table: Int[Array, "B M"]
    lengths: Int[Array, " B"]

    @staticmethod
    def empty(
        page_table: Int[Array, "B M"], pages: int, page_size: int, kv_heads: int, head_dim: int, dtype
    ) -> "PagedKVCache":
        """An empty `PagedKVCache` whose rows may fill the pages that `page_table` gives them."""
        shape = (pages, page_size, kv_heads, head_dim)
        return PagedKVCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            page_table,
            jnp.zeros(len(page_table), jnp.int32),
        )

    def write(self, key: Array, value: Array, counts: Int[Array, " B"] | None = None) -> "PagedKVCache":
        """With T more tokens in every row, or the first `counts` of them; what has no page is lost."""
        pages, size = self.key_pages.shape[:2]
        b, t = key.shape[:2]
        counts = jnp.full(b, t) if counts is None else counts
        position = self.lengths[:, None] + jnp.arange(t)[None, :]
        page = jnp.take_along_axis(
            self.page_table, jnp.minimum(position // size, self.page_table.shape[1] - 1), axis=1
        )
        fits = (jnp.arange(t)[None, :] < counts[:, None]) & (position // size < self.page_table.shape[1])
        page = jnp.where(fits & (page >= 0), page, pages)  # beyond the pool: dropped

        def put(cache, new):
            return cache.at[page, position % size].set(new.astype(cache.dtype), mode="drop")

        return PagedKVCache(
            put(self.key_pages, key), put(self.value_pages, value), self.page_table, self.lengths + counts
        )

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of every stretch of every row, (B, stretches * page size, K, D)."""

        def gather(cache):
            rows = jnp.take(cache, jnp.maximum(self.page_table, 0), axis=0)
            return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).astype(dtype)

        return gather(self.key_pages), gather(self.value_pages)

    def mask(self, count: int) -> Mask:
        """What the last `count` tokens of every row may attend to."""
        slots = jnp.arange(self.page_table.shape[1] * self.key_pages.shape[1])[None, :]
        is_cached = (slots < self.lengths[:, None]) & (
            jnp.repeat(self.page_table, self.key_pages.shape[1], axis=1) >= 0
        )
        queries = self.lengths[:, None] - count + jnp.arange(count)[None, :]
        return CachedPositionsMask(queries, jnp.where(is_cached, slots, -1))


@pytree
class QuantizedKVCache:
    """Keys and values in 8 bits, with a scale for each token and head.

    Attributes:
      key: int8 or float8, (B, S, K, D).
      value: as `key`, (B, S, K, Dv).
      key_scale: what a key is to be multiplied with, float32, (B, S, K, 1).
      value_scale: the same of a value.
    """

    key: Array
    value: Array
    key_scale: Float[Array, "B S K 1"]
    value_scale: Float[Array, "B S K 1"]

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype=jnp.int8) -> "QuantizedKVCache":
        """An empty `QuantizedKVCache` of "int8", "float8_e4m3fn" or another 8-bit dtype."""
        shape, scales = (batch, slots, kv_heads, head_dim), jnp.zeros((batch, slots, kv_heads, 1))
        return QuantizedKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales, scales)

    def write(self, start: Index, key: Array, value: Array) -> "QuantizedKVCache":
        """With the tokens from position `start` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        (key, key_scale), (value, value_scale) = (_quantize(x, self.key.dtype) for x in (key, value))
        caches = self.key, self.value, self.key_scale, self.value_scale
        new = key, value, key_scale, value_scale
        return QuantizedKVCache(*(put(cache, x, start, axis=1) for cache, x in zip(caches, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of all slots, as near as 8 bits come to them."""
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return tuple((x.astype(jnp.float32) * scale).astype(dtype) for x, scale in pairs)  # type: ignore[return-value]

    def mask(self, start: Index, count: int) -> Mask:
        """What the queries from `start` on may attend to."""
        del count
        return causal(start)


def _quantize(x: Array, dtype) -> tuple[Array, Array]:
    """Each vector as its largest number allows, and the scale to undo it."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    max_value = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max.astype(jnp.float32)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / max_value
    scaled = x / jnp.where(scale == 0, 1, scale)
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale
