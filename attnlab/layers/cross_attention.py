"""Attention layers that attend to an encoder output."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention import segments
from attnlab.attention.kv_cache import KVCache, LayerCache
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import conjunction
from attnlab.layers.attention import AttentionLayer, SequenceInputs
from attnlab.layers.specs import Bidirectional, FirstValue, LayerSpec
from attnlab.sharding import gather_length

CROSS_SPEC = Bidirectional()  # of the cross-attention branches of all layers


class CrossAttention(AttentionLayer):
    """Cross-attention to the whole encoder output, without positions.

    Vaswani et al. 2017, section 3.2.3.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], LayerCache | None, FirstValue | None]:
        """Return the layer's output, its cache, which holds the memory's keys and values, and None.

        `inputs.memory` replaces the contents of the cache; if it is None, the cache must hold them.
        """
        assert layer_cache is None or isinstance(layer_cache, KVCache)
        memory, embed = inputs.memory, x.shape[-1]
        query = self.project(x, "query", embed)
        if memory is not None:
            key, value = (self.project(memory.hidden, name, embed) for name in ("key", "value"))
            if layer_cache is not None:
                assert memory.mask is None, "a KV cache cannot hold memory.mask"
                cache_dtype = layer_cache.key.dtype
                layer_cache = KVCache(key.astype(cache_dtype), value.astype(cache_dtype))
        else:
            assert layer_cache is not None, "cross-attention needs a memory or cache"
            key, value = (y.astype(query.dtype) for y in (layer_cache.key, layer_cache.value))
        masks = cross_attention_mask(self.spec, inputs), inputs.block_masks.cross
        return self._attend(query, key, value, *masks, embed, deterministic), layer_cache, None


class PerceiverAttention(AttentionLayer):
    """Attention to the concatenation of the normalised memory and the tokens, without positions.

    The memory must have the model's width.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], LayerCache | None, FirstValue | None]:
        """Return the layer's output, the unchanged cache (it caches nothing), and None."""
        memory, embed = inputs.memory, x.shape[-1]
        assert memory is not None, "Perceiver attention needs a memory"
        normed = self.norm.build(self.dtypes, name="memory_norm")(memory.hidden)
        memory_and_tokens = jnp.concatenate([gather_length(normed), gather_length(x)], axis=1)
        query = self.project(x, "query", embed)
        key, value = (self.project(memory_and_tokens, name, embed) for name in ("key", "value"))
        masks = perceiver_attention_mask(self.spec, inputs), inputs.block_masks.get(self.spec)
        return self._attend(query, key, value, *masks, embed, deterministic), layer_cache, None


def cross_attention_mask(spec: LayerSpec, inputs: SequenceInputs) -> Mask:
    """Return the mask of `CrossAttention`, over the memory or the memory in the cache."""
    memory, cache = inputs.memory, inputs.cache
    if memory is not None:
        return conjunction(spec.mask(), inputs.documents.mask(memory.documents), memory.mask)
    assert cache is not None, "cross-attention needs a memory or cache"
    return spec.mask() & segments(inputs.segments, cache.context)


def perceiver_attention_mask(spec: LayerSpec, inputs: SequenceInputs) -> Mask:
    """Return the mask of `PerceiverAttention`, over the memory followed by the tokens."""
    assert inputs.memory is not None, "Perceiver attention needs a memory"
    keys = inputs.memory.documents.followed_by(inputs.documents)
    return conjunction(spec.mask(), inputs.documents.mask(keys))
