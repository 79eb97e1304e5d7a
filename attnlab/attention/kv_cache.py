"""Other stores of keys and values than the contiguous one: rolling, paged, and of fewer bits.

Each is a value: `write` gives a new store with more tokens in it, `read` the keys and values of its slots,
and `mask` which of them the queries at given positions may attend to, so that

    store = store.write(first, key, value)
    out = attend(query, *store.read(query.dtype), mask=store.mask(first, query.shape[1]))

is causal attention over all that was written, as far back as the store reaches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.masks.basic import causal
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@pytree
class Held(Mask):
    """Slots that hold a token no later than the query, and at most `window - 1` before it.

    Attributes:
      queries: position of each query, (B or 1, T).
      keys: position of the token in each slot, -1 where there is none, (B or 1, S).
      window: how far back a query sees, itself included; None is no limit.
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    window: int | None = None

    dims = {"queries": ("batch", "queries"), "keys": ("batch", "keys")}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        q, k = self.queries[:, None, :, None], self.keys[:, None, None, :]
        allowed = (k >= 0) & (k <= q)
        return allowed if self.window is None else allowed & (k > q - self.window)


@pytree
class Rolling:
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

    def write(self, first: Index, key: Array, value: Array) -> "Rolling":
        """With the tokens from position `first` on.

        Raises:
          InputError: so many tokens at once that they would write over what the first of them sees.
        """
        slots, count = len(self.positions), key.shape[1]
        if count + self.window - 1 > slots:
            raise InputError(
                f"{slots} slots take {slots - self.window + 1} tokens at a time for a window of "
                f"{self.window}, not {count}"
            )
        positions = first + jnp.arange(count)

        def put(store, new, axis):
            # Each slot takes the new token whose turn it is, if there is one.
            turn = (jnp.arange(slots) - first) % slots
            taken = jnp.take(new, jnp.minimum(turn, count - 1), axis=axis)
            shape = [-1 if i == axis else 1 for i in range(store.ndim)]
            return jnp.where((turn < count).reshape(shape), taken.astype(store.dtype), store)

        return Rolling(
            put(self.key, key, 1), put(self.value, value, 1), put(self.positions, positions, 0), self.window
        )

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of all slots."""
        return self.key.astype(dtype), self.value.astype(dtype)

    def mask(self, first: Index, count: int) -> Mask:
        """What the queries at `first` and the `count - 1` positions after it may attend to."""
        return Held((first + jnp.arange(count))[None], self.positions[None], self.window)


@pytree
class Paged:
    """Pages of a pool that rows share out among themselves (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

    Attributes:
      keys: (pages, page size, K, D).
      values: (pages, page size, K, Dv).
      table: the page of each stretch of a row, -1 where it has none yet, (B, stretches).
      lengths: tokens in each row, (B,).
    """

    keys: Float[Array, "P N K D"]
    values: Float[Array, "P N K Dv"]
    table: Int[Array, "B M"]
    lengths: Int[Array, " B"]

    def write(self, key: Array, value: Array, counts: Int[Array, " B"] | None = None) -> "Paged":
        """With T more tokens in every row, or the first `counts` of them; what has no page is lost."""
        pages, size = self.keys.shape[:2]
        b, t = key.shape[:2]
        counts = jnp.full(b, t) if counts is None else counts
        position = self.lengths[:, None] + jnp.arange(t)[None, :]
        page = jnp.take_along_axis(self.table, jnp.minimum(position // size, self.table.shape[1] - 1), axis=1)
        fits = (jnp.arange(t)[None, :] < counts[:, None]) & (position // size < self.table.shape[1])
        page = jnp.where(fits & (page >= 0), page, pages)  # beyond the pool: dropped

        def put(store, new):
            return store.at[page, position % size].set(new.astype(store.dtype), mode="drop")

        return Paged(put(self.keys, key), put(self.values, value), self.table, self.lengths + counts)

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of every stretch of every row, (B, stretches * page size, K, D)."""

        def gather(store):
            rows = jnp.take(store, jnp.maximum(self.table, 0), axis=0)
            return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).astype(dtype)

        return gather(self.keys), gather(self.values)

    def mask(self, count: int) -> Mask:
        """What the last `count` tokens of every row may attend to."""
        slots = jnp.arange(self.table.shape[1] * self.keys.shape[1])[None, :]
        held = (slots < self.lengths[:, None]) & (jnp.repeat(self.table, self.keys.shape[1], axis=1) >= 0)
        queries = self.lengths[:, None] - count + jnp.arange(count)[None, :]
        return Held(queries, jnp.where(held, slots, -1))


@pytree
class Quantised:
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

    def write(self, first: Index, key: Array, value: Array) -> "Quantised":
        """With the tokens from position `first` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        (key, key_scale), (value, value_scale) = (_quantise(x, self.key.dtype) for x in (key, value))
        stores = self.key, self.value, self.key_scale, self.value_scale
        new = key, value, key_scale, value_scale
        return Quantised(*(put(store, x, first, axis=1) for store, x in zip(stores, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """Keys and values of all slots, as near as 8 bits come to them."""
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return tuple((x.astype(jnp.float32) * scale).astype(dtype) for x, scale in pairs)  # type: ignore[return-value]

    def mask(self, first: Index, count: int) -> Mask:
        """What the queries from `first` on may attend to."""
        del count
        return causal(first)


def _quantise(x: Array, dtype) -> tuple[Array, Array]:
    """Each vector as its largest number allows, and the scale to undo it."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    most = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max.astype(jnp.float32)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most
    scaled = x / jnp.where(scale == 0, 1, scale)
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale


def rolling(batch: int, slots: int, window: int, kv_heads: int, head_dim: int, dtype) -> Rolling:
    """An empty `Rolling`; `slots` less `window - 1` tokens may be written at a time."""
    shape = (batch, slots, kv_heads, head_dim)
    return Rolling(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(slots, -1), window)


def paged(table: Int[Array, "B M"], pages: int, page_size: int, kv_heads: int, head_dim: int, dtype) -> Paged:
    """An empty `Paged` whose rows may fill the pages that `table` gives them."""
    shape = (pages, page_size, kv_heads, head_dim)
    return Paged(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), table, jnp.zeros(len(table), jnp.int32))


def quantised(batch: int, slots: int, kv_heads: int, head_dim: int, dtype=jnp.int8) -> Quantised:
    """An empty `Quantised` of "int8", "float8_e4m3fn" or another 8-bit dtype."""
    shape, scales = (batch, slots, kv_heads, head_dim), jnp.zeros((batch, slots, kv_heads, 1))
    return Quantised(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales, scales)
