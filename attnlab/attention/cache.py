"""Keys and values of tokens already read, as a value that goes in and comes out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.masks.base import Index


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values for every slot, (B, S, K, D); of scanned layers, (L, B, S, K, D)."""

    key: Float[Array, "*L B S K D"]
    value: Float[Array, "*L B S K D"]

    def write(self, first: Index, key: Array, value: Array) -> "LayerCache":
        """With new keys and values in the slots from `first` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        return LayerCache(
            put(self.key, key.astype(self.key.dtype), first, axis=1),
            put(self.value, value.astype(self.value.dtype), first, axis=1),
        )

    def map_rows(self, function: Callable[[Array], Array]) -> "LayerCache":
        """With keys and values that a function makes of those of all rows, of each layer by itself."""
        for _ in range(self.key.ndim - 4):
            function = jax.vmap(function)
        return LayerCache(function(self.key), function(self.value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a decoder has read: slots filled in step over the batch, rows padded on the left.

    Attributes:
      layers: a model's own arrangement of `LayerCache`.
      segments: 1 where a slot holds a token, 0 where it is padding or empty, (B, S).
      index: the next slot to fill.
      context: what a decoder reads beside its own tokens, such as an encoder's output: any arrangement of
        `LayerCache`, and of arrays that start with the batch axis.
    """

    layers: Any
    segments: Int[Array, "B S"]
    index: Int[Array, ""]
    context: Any = None

    @property
    def first(self) -> Int[Array, " B"]:
        """The slot of each row's first token."""
        return jnp.argmax(self.segments > 0, axis=1)

    def advance(self, segments: Int[Array, "B T"]) -> "Cache":
        """With the slots of T new tokens marked, before their keys are written."""
        marked = jax.lax.dynamic_update_slice_in_dim(self.segments, segments, self.index, axis=1)
        return dataclasses.replace(self, segments=marked, index=self.index + segments.shape[1])

    def rewind(self, count: Index) -> "Cache":
        """Without the last `count` tokens of every row, whose slots will be written over."""
        index = self.index - count
        before = jnp.arange(self.segments.shape[1])[None] < index
        return dataclasses.replace(self, segments=jnp.where(before, self.segments, 0), index=index)

    def take(self, rows: Int[Array, "G N"]) -> "Cache":
        """With other rows, where the batch is G groups: N of each, that may repeat, counted in the group.

        Groups that lie on one device stay there.
        """

        def take(x: Array) -> Array:
            return take_rows(x, rows)

        layers, segments, context = map_rows(take, (self.layers, self.segments, self.context))
        return dataclasses.replace(self, layers=layers, segments=segments, context=context)


def map_rows(function: Callable[[Array], Array], tree: Any) -> Any:
    """A tree of `LayerCache` and arrays that start with the batch axis, a function applied to each array."""

    def apply(x):
        return x.map_rows(function) if isinstance(x, LayerCache) else function(x)

    return jax.tree.map(apply, tree, is_leaf=lambda x: isinstance(x, LayerCache))


def take_rows(x: Array, rows: Int[Array, "G N"]) -> Array:
    """`rows` of each of the G groups that the first axis of `x` is made of, (G * N, ...)."""
    groups, count = rows.shape
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    batch, *rest = jax.typeof(x).sharding.spec if in_mesh else (None,)
    # Said, for what is reshaped from a single row may lose its layout.
    apart, together = (jax.P(batch, None, *rest), jax.P(batch, *rest)) if in_mesh else (None, None)
    x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:], out_sharding=apart)
    x = jax.vmap(lambda group, index: group[index])(x, rows)
    return x.reshape(groups * count, *x.shape[2:], out_sharding=together)


def empty_layer(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> LayerCache:
    """A layer's cache with nothing in it."""
    shape = (batch, slots, kv_heads, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
