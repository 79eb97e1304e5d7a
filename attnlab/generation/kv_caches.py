"""The kinds of KV caches of generation, selected by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnlab import sharding
from attnlab.attention.kv_cache import (
    DecoderCache,
    LayerCache,
    PagedKVCache,
    QuantizedKVCache,
    RollingKVCache,
)
from attnlab.attention.masks.basic import normal_form
from attnlab.errors import InputError
from attnlab.layers.specs import LayerSpec

KV_CACHES = ("contiguous", "rolling", "paged", "int8", "fp8")
QUANTIZED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
PAGE_SIZE = 16  # tokens per page, as in vLLM


@dataclass(frozen=True)
class KVCacheOptions:
    """Options of the KV caches of one call.

    Attributes:
      kind: one of `KV_CACHES`. "rolling" keeps only the last tokens in layers with a window.
        "paged" gives every row the pages that it needs. "int8" and "fp8" store 8 bits per number;
        see `QuantizedKVCache` for their error.
      spare: number of tokens that decoding may take back; see `DecoderCache.rewind`.
      pages: number of pages of the pool of each layer, if "paged"; see `count_pages`.
    """

    kind: str = "contiguous"
    spare: int = 0
    pages: int = 0

    def __post_init__(self):
        if self.kind not in KV_CACHES:
            raise InputError(f"kv_cache={self.kind!r} must be one of {', '.join(KV_CACHES)}")

    def apply(self, cache: Any, config: Any, segments: Int[Array, "B T"]) -> Any:
        """Return an empty cache of contiguous caches with caches of this kind.

        Args:
          cache: the cache of `init_cache`.
          config: the config of the model.
          segments: 0 at the padding of the prompts.

        Raises:
          InputError: the model has no KV cache, or none that this kind supports.
        """
        if self.kind == "contiguous":
            return cache
        if not isinstance(cache, DecoderCache):
            raise InputError(f"kv_cache={self.kind} needs a model with attention; this model is recurrent")
        config = getattr(config, "decoder", config)
        if self.kind == "rolling" and all(window_of(spec) is None for spec in config.pattern):
            raise InputError(
                "kv_cache=rolling needs a layer with a window, such as Sliding(256) in model.pattern; "
                "use contiguous, paged, int8 or fp8"
            )
        table = _page_table(segments, cache.segments.shape[1]) if self.kind == "paged" else None

        def convert(layers: Sequence[Any] | None) -> tuple[Any, ...] | None:
            if layers is None:
                return None
            return tuple(
                self._convert(x, spec, table) for x, spec in zip(layers, config.pattern, strict=False)
            )

        scanned, remainder = cache.layers
        return DecoderCache(
            (convert(scanned), convert(remainder)), cache.segments, cache.index, cache.context
        )

    def _convert(self, cache: Any, spec: LayerSpec, table: Int[Array, "B M"] | None) -> Any:
        """Return an empty cache of one layer, or of scanned layers, as one of this kind."""
        if isinstance(cache, tuple):  # with the cache of cross-attention, which stays as it is
            return (self._convert(cache[0], spec, table), *cache[1:])
        if cache.state or cache.key.shape != cache.value.shape:
            raise InputError(
                f"kv_cache={self.kind} does not support the score or mixer of {spec}; use contiguous"
            )
        (*layers, batch, slots, kv_heads, head_dim), dtype = cache.key.shape, cache.key.dtype
        sizes = kv_heads, head_dim
        window = window_of(spec)
        if self.kind in QUANTIZED:
            new: LayerCache = QuantizedKVCache.empty(batch, slots, *sizes, QUANTIZED[self.kind])
        elif table is not None:
            new = PagedKVCache.empty(table, self.pages, PAGE_SIZE, *sizes, dtype)
        elif window is not None and window + self.spare < slots:
            new = RollingKVCache.empty(batch, window, *sizes, dtype, spare=self.spare)
        else:
            return cache
        return jax.tree.map(lambda x: _stack(x, layers), new)


def window_of(spec: LayerSpec) -> int | None:
    """Return the number of tokens that a query of a layer attends to; None if it is not bounded."""
    left = normal_form(spec.mask()).left
    return left + 1 if isinstance(left, int) else None


def count_pages(padding: Int[np.ndarray, " B"], slots: int) -> int:
    """Return the number of pages for rows of `slots` slots that begin with padding."""
    return int(np.sum(-(-(slots - padding) // PAGE_SIZE)))


def check_paged(config: Any, batch_shards: int) -> None:
    """Check that a model and a mesh support a paged KV cache.

    Raises:
      InputError: the rows are sharded, or begin with an image.
    """
    if batch_shards > 1:
        raise InputError(f"kv_cache=paged needs all rows on one device, not on {batch_shards} shards")
    if getattr(config, "text_offset", 0):
        raise InputError("kv_cache=paged needs rows of text; this model puts an image before the text")


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all arrays of a cache."""
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def _page_table(segments: Int[Array, "B T"], slots: int) -> Int[Array, "B M"]:
    """Return the pages of each row, in order; see `count_pages`."""
    counts = -(-(slots - jnp.argmax(segments > 0, axis=1)) // PAGE_SIZE)
    counts = sharding.constrain(counts, None)[:, None]
    chunks = jnp.arange(-(-slots // PAGE_SIZE))[None]
    return jnp.where(chunks < counts, jnp.cumsum(counts, axis=0) - counts + chunks, -1)


def _stack(x: Array, layers: Sequence[int]) -> Array:
    """Return the array of a layer's cache once for each layer, sharded."""
    axes: dict[int, tuple[str | None, ...]] = {
        1: (None,),
        2: ("batch", None),
        4: ("batch", None, "kv_heads", None),
    }
    x = jnp.broadcast_to(x, (*layers, *x.shape))
    return sharding.constrain(x, *(None for _ in layers), *axes[x.ndim - len(layers)])
