"""KV caches: keys and values of tokens already processed, as immutable pytrees.

A decoder stores its tokens in slots: all rows fill the same slot, and rows are left-padded. The
cache of one layer is a `LayerCache`, which may keep fewer keys than slots or keep them in 8 bits.
`DecoderCache` is the cache of a whole decoder. A layer attends by

    cache, cached = cache.append(start, key, value, row_starts)
    out = attend(query, cached.key, cached.value, mask=cached.mask(mask))

where `mask` is over the slots of the decoder.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.pairwise import pytree, static
from attnlab.attention.scores import Score
from attnlab.errors import InputError


class CachedKeys(NamedTuple):
    """The keys and values of a layer's cache.

    Attributes:
      key: (B, N, K, D), in the dtype of the new keys.
      value: (B, N, K, D).
      slots: decoder slot of each key, -1 if it has none, (B or 1, N). None if key i is in slot i.
    """

    key: Float[Array, "B N K D"]
    value: Float[Array, "B N K Dv"]
    slots: Int[Array, "#B N"] | None = None

    def mask(self, mask: Mask) -> Mask:
        """Return a mask over slots as the mask over these keys."""
        return mask if self.slots is None else _SlotMask(mask, self.slots)

    def score(self, score: Score | None) -> Score | None:
        """Return a score over slots as the score over these keys.

        Raises:
          InputError: the score holds an array over keys, or the slots of the rows differ.
        """
        if score is None or self.slots is None:
            return score
        if len(self.slots) > 1:
            raise InputError("kv_cache=paged does not support scores; use contiguous, rolling, int8 or fp8")

        def check(x, dims):
            if any(name == "keys" and n > 1 for name, n in zip(dims, jnp.shape(x), strict=True)):
                raise InputError(
                    "kv_cache=rolling does not support a score that depends on the keys before; "
                    "use contiguous, int8 or fp8"
                )
            return x

        return _SlotScore(score.map_arrays(check), self.slots)

    def gather(self, x: Int[Array, "B S"]) -> Int[Array, "B N"]:
        """Return the numbers of an array over slots for these keys, 0 for keys without a slot."""
        if self.slots is None:
            return x
        index = jnp.maximum(self.slots, 0)
        by_row = len(index) > 1
        found = _take_of_row(x, index) if by_row else jnp.take(x, index[0], axis=1)
        return jnp.where(self.slots >= 0, found, 0)


@pytree
class _SlotMask(Mask):
    """A mask over slots, for keys in these slots."""

    inner: Mask
    slots: Int[Array, "#B N"]

    dims = {"slots": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        slots = self.slots[:, None, None, :]
        return self.inner.evaluate(at._replace(kv=slots)) & (slots >= 0)


@pytree
class _SlotScore(Score):
    """A score over slots, for keys in these slots."""

    inner: Score
    slots: Int[Array, "1 N"]

    dims = {"slots": ("batch", "keys")}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.inner(scores, at._replace(kv=self.slots[:, None, None, :]))


class LayerCache(ABC):
    """Base class of the KV caches of one layer, or of L scanned layers.

    Attributes:
      keeps_slots: whether it keeps a key for every slot, key i in slot i.
    """

    keeps_slots: ClassVar[bool] = False

    @abstractmethod
    def append(
        self, start: Index, key: Array, value: Array, row_starts: Int[Array, " B"]
    ) -> tuple[Self, CachedKeys]:
        """Return the cache with T new tokens, and the keys and values to attend to.

        Args:
          start: the slot of the first new token. Tokens in slots from `start` on are forgotten.
          key: (B, T, K, D).
          value: (B, T, K, D).
          row_starts: the slot of the first token of each row; earlier slots are padding.
        """

    @abstractmethod
    def map_rows(self, function: Callable[[Array], Array]) -> Self:
        """Apply a function of (B, ...) arrays to all arrays with rows, layer by layer."""


def _per_layer(function: Callable[[Array], Array], key: Array) -> Callable[[Array], Array]:
    """Return a function of one layer's arrays as one of those of a cache with these keys."""
    return function if key.ndim == 4 else jax.vmap(function)


def _spec(x: Array) -> Any:
    """Return the PartitionSpec in the type of an array; None outside a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def _take_of_row(x: Int[Array, "B S"], index: Int[Array, "B N"]) -> Int[Array, "B N"]:
    return jax.vmap(lambda row, i: row[i])(x, index)


def _put(cache: Array, new: Array, start: Index) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(LayerCache):
    """A key and a value for every slot, (B, S, K, D), or of L scanned layers, (L, B, S, K, D).

    `state` holds what else later tokens need of the token in each slot, by name, (*L, B, S, ...).
    """

    key: Float[Array, "*L B S K D"]
    value: Float[Array, "*L B S K Dv"]
    state: dict[str, Array] = dataclasses.field(default_factory=dict)

    keeps_slots = True

    def append(self, start, key, value, row_starts):
        """See `LayerCache.append`."""
        cache = KVCache(_put(self.key, key, start), _put(self.value, value, start), self.state)
        return cache, CachedKeys(cache.key.astype(key.dtype), cache.value.astype(value.dtype))

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "KVCache":
        """Return a cache of zeros for one layer."""
        shape = (batch, slots, kv_heads, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def map_rows(self, function):
        """See `LayerCache.map_rows`."""
        return jax.tree.map(_per_layer(function, self.key), self)


@pytree
class RollingKVCache(LayerCache):
    """KV cache of sliding-window attention: new tokens overwrite the oldest (arXiv 2310.06825).

    Attributes:
      key: (B, N, K, D). The token of decoder slot i is at i % N.
      value: (B, N, K, D).
      slots: the decoder slot of each key, -1 for none, (N,).
      window: number of slots that a query attends to, including its own.
    """

    key: Float[Array, "*L B N K D"]
    value: Float[Array, "*L B N K D"]
    slots: Int[Array, "*L N"]
    window: int = static()

    @staticmethod
    def empty(batch: int, window: int, kv_heads: int, head_dim: int, dtype, spare: int = 0):
        """Return an empty cache of `window + spare` tokens.

        The next token may be written `spare` slots before the last one, as in speculative decoding.
        """
        shape = (batch, window + spare, kv_heads, head_dim)
        return RollingKVCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(window + spare, -1), window
        )

    def append(self, start, key, value, row_starts):
        """See `LayerCache.append`."""
        size, count = len(self.slots), key.shape[1]
        new_slots = start + jnp.arange(count)
        old_slots = jnp.where(self.slots < start, self.slots, -1)
        kept = slice(max(count - size, 0), None)  # older tokens would be overwritten at once
        first = start + kept.start
        # Key i of the cache becomes token `index` of those kept, if there is one.
        index = (jnp.arange(size) - first) % size
        is_new, index = index < count - kept.start, jnp.minimum(index, count - kept.start - 1)

        def put(cache, new, axis):
            shape = [-1 if i == axis else 1 for i in range(cache.ndim)]
            gathered = jnp.take(new, kept.start + index, axis=axis).astype(cache.dtype)
            return jnp.where(is_new.reshape(shape), gathered, cache)

        cache = RollingKVCache(
            put(self.key, key, 1), put(self.value, value, 1), put(old_slots, new_slots, 0), self.window
        )
        if count + self.window - 1 <= size:  # no token in the window of the first was overwritten
            cached = CachedKeys(
                cache.key.astype(key.dtype), cache.value.astype(value.dtype), cache.slots[None]
            )
        else:
            pairs = ((self.key.astype(key.dtype), key), (self.value.astype(value.dtype), value))
            both = [jnp.concatenate(pair, axis=1) for pair in pairs]
            cached = CachedKeys(*both, jnp.concatenate([old_slots, new_slots])[None])
        return cache, cached

    def map_rows(self, function):
        """See `LayerCache.map_rows`."""
        function = _per_layer(function, self.key)
        return dataclasses.replace(self, key=function(self.key), value=function(self.value))


@pytree
class PagedKVCache(LayerCache):
    """KV cache in pages of a shared pool (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

    Padding takes no place: token i of a row is at i % N of the row's page i // N.

    Attributes:
      key_pages: (P, N, K, D), for P pages of N tokens.
      value_pages: (P, N, K, D).
      page_table: page of each chunk of N tokens of a row, -1 if it has none, (B, M).
    """

    key_pages: Float[Array, "*L P N K D"]
    value_pages: Float[Array, "*L P N K D"]
    page_table: Int[Array, "*L B M"]

    @staticmethod
    def empty(page_table: Int[Array, "B M"], pages: int, page_size: int, kv_heads: int, head_dim: int, dtype):
        """Return an empty cache with the given page table."""
        shape = (pages, page_size, kv_heads, head_dim)
        return PagedKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), page_table)

    def append(self, start, key, value, row_starts):
        """See `LayerCache.append`. Padding and tokens without a page are dropped."""
        (pages, size), chunks = self.key_pages.shape[:2], self.page_table.shape[1]
        at = start + jnp.arange(key.shape[1])[None] - row_starts[:, None]
        page = _take_of_row(self.page_table, jnp.clip(at // size, 0, chunks - 1))
        exists = (at >= 0) & (at < chunks * size) & (page >= 0)
        page = jnp.where(exists, page, pages)  # out of bounds, so that `mode="drop"` applies

        def put(pool, new):
            new = new.astype(pool.dtype)
            return pool.at[page, at % size].set(new, mode="drop", out_sharding=_spec(pool))

        cache = PagedKVCache(put(self.key_pages, key), put(self.value_pages, value), self.page_table)
        slots = jnp.arange(chunks * size)[None] + row_starts[:, None]
        has_page = jnp.repeat(self.page_table >= 0, size, axis=1)

        def gather(pool):
            spec = _spec(pool) and jax.P(_spec(key)[0], None, *_spec(pool)[1:])
            rows = pool.at[jnp.maximum(self.page_table, 0)].get(out_sharding=spec)
            return rows.reshape(len(rows), -1, *rows.shape[3:]).astype(key.dtype)

        keys, values = gather(cache.key_pages), gather(cache.value_pages)
        return cache, CachedKeys(keys, values, jnp.where(has_page, slots, -1))

    def map_rows(self, function):
        """Raise InputError: the rows of a beam would write to the same pages."""
        raise InputError("kv_cache=paged does not support beam search; use contiguous, rolling, int8 or fp8")


@pytree
class QuantizedKVCache(LayerCache):
    """KV cache in 8 bits, with one scale per token and head.

    The error of a number is at most max|x| / 254 of its vector for int8, and for float8 with m bits
    of mantissa at most 2^-(m+1) of the number, or half the smallest subnormal number.

    Attributes:
      key: int8 or float8, (B, S, K, D).
      value: the same dtype, (B, S, K, D).
      key_scale: dequantization factor of each key, float32, (B, S, K, 1).
      value_scale: dequantization factor of each value, float32, (B, S, K, 1).
    """

    key: Array
    value: Array
    key_scale: Float[Array, "*L B S K 1"]
    value_scale: Float[Array, "*L B S K 1"]

    keeps_slots = True

    @staticmethod
    def empty(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> "QuantizedKVCache":
        """Return an empty cache of an 8-bit dtype: int8, float8_e4m3fn, float8_e5m2 or another."""
        shape, scales = (batch, slots, kv_heads, head_dim), jnp.zeros((batch, slots, kv_heads, 1))
        return QuantizedKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales, scales)

    def append(self, start, key, value, row_starts):
        """See `LayerCache.append`."""
        (k, k_scale), (v, v_scale) = (_quantize(x, self.key.dtype) for x in (key, value))
        caches = self.key, self.value, self.key_scale, self.value_scale
        cache = QuantizedKVCache(
            *(_put(old, new, start) for old, new in zip(caches, (k, v, k_scale, v_scale), strict=True))
        )
        return cache, CachedKeys(
            (cache.key.astype(jnp.float32) * cache.key_scale).astype(key.dtype),
            (cache.value.astype(jnp.float32) * cache.value_scale).astype(value.dtype),
        )

    def map_rows(self, function):
        """See `LayerCache.map_rows`."""
        return jax.tree.map(_per_layer(function, self.key), self)


def _quantize(x: Array, dtype) -> tuple[Array, Array]:
    """Quantize each vector by its largest absolute value; return also the dequantization factor."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    max_value = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max.astype(jnp.float32)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / max_value
    scaled = x / jnp.where(scale == 0, 1, scale)
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderCache:
    """KV caches of a decoder's layers. All rows fill the same slot; rows are left-padded.

    Attributes:
      layers: a pytree of `LayerCache` that the model defines.
      segments: 1 for slots that hold a token, 0 for padding and empty slots, (B, S).
      index: the next slot to fill.
      context: inputs other than the decoder's own tokens, such as an encoder's output: a pytree of
        `LayerCache` and of arrays whose first axis is the batch.
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
    """Apply a function of (B, ...) arrays to each array of a pytree of arrays and `LayerCache`."""

    def apply(x):
        return x.map_rows(function) if isinstance(x, LayerCache) else function(x)

    return jax.tree.map(apply, tree, is_leaf=lambda x: isinstance(x, LayerCache))


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
