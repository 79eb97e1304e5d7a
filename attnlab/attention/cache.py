"""Keys and values of tokens already read, as a value that goes in and comes out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.masks import Index


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values for every slot, (B, S, K, D)."""

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K D"]

    def write(self, first: Index, key: Array, value: Array) -> "LayerCache":
        """With new keys and values in the slots from `first` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        return LayerCache(
            put(self.key, key.astype(self.key.dtype), first, axis=1),
            put(self.value, value.astype(self.value.dtype), first, axis=1),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a decoder has read: slots filled in step over the batch, rows padded on the left.

    Attributes:
      layers: a model's own arrangement of `LayerCache`.
      segments: 1 where a slot holds a token, 0 where it is padding or empty, (B, S).
      index: the next slot to fill.
    """

    layers: object
    segments: Int[Array, "B S"]
    index: Int[Array, ""]

    @property
    def first(self) -> Int[Array, " B"]:
        """The slot of each row's first token."""
        return jnp.argmax(self.segments > 0, axis=1)

    def advance(self, segments: Int[Array, "B T"]) -> "Cache":
        """With the slots of T new tokens marked, before their keys are written."""
        marked = jax.lax.dynamic_update_slice_in_dim(self.segments, segments, self.index, axis=1)
        return Cache(self.layers, marked, self.index + segments.shape[1])


def empty_layer(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> LayerCache:
    """A layer's cache with nothing in it."""
    shape = (batch, slots, kv_heads, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
