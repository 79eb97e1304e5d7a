"""Multi-head attention modules: projections, positions and KV cache around one call of `attend`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention import attend, causal, segments, shift_mask, softcap, t5_bias, window
from attnlab.attention.kv_cache import DecoderCache, KVCache
from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.positions import Scaling, rotary
from attnlab.attention.scores import Score
from attnlab.layers.linear import Linear
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import Dtypes, parameter


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding over the first `fraction` of each head's width.

    `scaling` adapts the frequencies to lengths beyond the training length. `interleaved` rotates
    pairs of adjacent components of a head; otherwise the two components of a pair are half a head
    apart.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be over 0 and at most 1")

    def __call__(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Return queries or keys rotated by their positions."""
        return rotary(
            x,
            positions,
            theta=self.theta,
            fraction=self.fraction,
            scaling=self.scaling,
            interleaved=self.interleaved,
        )


@dataclass(frozen=True)
class RelativeBias:
    """Relative position bias of T5 (arXiv 1910.10683, section 2.1).

    Adds a learned bias to every attention score. The distance between query and key selects one of
    `buckets` buckets, whose size grows up to `max_distance`. All layers share one table.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets} must be at least 4, and "
                f"max_distance={self.max_distance} over half of that"
            )

    def __call__(self, table: Float[Array, "buckets H"], spec: "LayerSpec", offset: Index) -> Score:
        """Return the bias of a layer of this spec; its first query is at key index `offset`."""
        return t5_bias(table, bidirectional=not spec.causal, max_distance=self.max_distance, offset=offset)


@dataclass(frozen=True)
class NoPositions:
    """No position embedding: only the mask carries the order of the tokens (NoPE)."""


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Attention pattern of a layer. To try a new mask, derive a class in an experiment's file.

    Attributes:
      positions: position embedding of queries and keys; None uses the model's.
      cross_attends: whether the layer also cross-attends, in a model with cross-attention.
      causal: whether no token attends to a later one, as generation requires.
    """

    positions: Rotary | NoPositions | None = field(default=None, kw_only=True)
    cross_attends: bool = field(default=True, kw_only=True)
    causal: ClassVar[bool] = True

    @abstractmethod
    def mask(self, offset: Index = 0) -> Mask:
        """Return the mask; its first query is at key index `offset`."""


@dataclass(frozen=True)
class Causal(LayerSpec):
    """Causal attention: every token attends to itself and all earlier tokens."""

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return causal(offset)


@dataclass(frozen=True)
class Sliding(LayerSpec):
    """Sliding-window attention over the last `window` tokens, including the token itself.

    Mistral, arXiv 2310.06825, section 2.
    """

    window: int = 256

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return window(self.window - 1, 0, offset)


@dataclass(frozen=True)
class Bidirectional(LayerSpec):
    """Bidirectional attention to `left` tokens before and `right` tokens after each token.

    None does not limit that side.
    """

    left: int | None = None
    right: int | None = None
    causal: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.left or 0, self.right or 0) < 0:
            raise ValueError(f"left={self.left} and right={self.right} must be at least 0, or none")

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return window(self.left, self.right, offset)


@dataclass(frozen=True)
class AttentionConfig:
    """Config of every attention layer of a model.

    Attributes:
      heads: number of query heads H.
      kv_heads: number of key/value heads K; None means H, 1 is multi-query attention.
      head_dim: width D of a head; None means E / H.
      bias: projections that have a bias: all (true), none (false), or only those of the query, key
        and value ("qkv"), of the query, value and output ("qvo"), or of the output ("o").
      qk_norm: normalise queries and keys with the model's norm, per head (true; arXiv 2010.04245,
        2302.05442) or over all heads together ("whole"; OLMo 2, arXiv 2501.00656, section 3.2).
      softcap: softcap of the scores; None disables it.
      scale: factor of the scores; None means the initialisation's factor, or 1 / sqrt(D).
      sinks: add a learned logit without a value to each head's softmax (gpt-oss, arXiv 2508.10925).
      dropout: dropout rate of the attention weights in training.
    """

    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool | Literal["qkv", "qvo", "o"] = False
    qk_norm: bool | Literal["whole"] = False
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    dropout: float = 0.0

    def has_bias(self, projection: str) -> bool:
        """Return whether the projection "query", "key", "value" or "out" has a bias."""
        return projection[0] in self.bias if isinstance(self.bias, str) else self.bias

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} must be at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads must divide heads={self.heads}: one of {', '.join(map(str, divisors))}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be over 0, or none, not {self.softcap}")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale must be over 0, or none, not {self.scale}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderOutput:
    """Encoder output that cross-attention attends to.

    Attributes:
      hidden: activations; their width M may differ from the model's.
      segments: document id of each position, 0 for padding. Queries attend to their own document.
      mask: further restriction of those pairs, such as `media`; None allows all.
    """

    hidden: Float[Array, "B S M"]
    segments: Int[Array, "B S"]
    mask: Mask | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceInputs:
    """Inputs that all layers of a stack share, besides the activations.

    Attributes:
      segments: document id of each token in a packed row, 0 for padding.
      positions: position of each token in its document.
      cache: state of the KV cache without the layers' keys and values; None without a cache.
      memory: encoder output for cross-attention; None if the layers do not cross-attend, or if
        their caches hold its keys and values.
      relative_bias_table: the table of `RelativeBias`.
      bidirectional_ids: tokens with the same id over 0 attend to each other in both directions in
        every layer (prefix LM); None disables this.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    cache: DecoderCache | None = None
    memory: EncoderOutput | None = None
    relative_bias_table: Float[Array, "buckets H"] | None = None
    bidirectional_ids: Int[Array, "B T"] | None = None


class Attention(nn.Module):
    """Self-attention of one layer, with an optional KV cache.

    Attributes:
      config: heads and options.
      spec: attention pattern of the layer.
      positions: position embedding of queries and keys.
      norm: norm of queries and keys, used if `config.qk_norm`.
      scale: factor of the scores if `config.scale` is None; None means 1 / sqrt(D).
      std: standard deviation of the initial query, key and value weights.
      out_std: standard deviation of the initial output weights.
      dtypes: dtypes of parameters and computation.
    """

    config: AttentionConfig
    spec: LayerSpec
    positions: Rotary | RelativeBias | NoPositions
    norm: RMSNormConfig | LayerNormConfig
    scale: float | None
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Return the layer's output and its KV cache with the new keys and values appended."""
        query, key, value = (self._project(x, name, x.shape[-1]) for name in ("query", "key", "value"))
        if isinstance(self.positions, Rotary):
            query, key = (self.positions(y, inputs.positions) for y in (query, key))
        offset: Index = 0
        mask, key_segments, cache = self.spec.mask(), inputs.segments, inputs.cache
        if cache is not None and layer_cache is not None:
            offset, key_segments = cache.index - x.shape[1], cache.segments
            mask = shift_mask(self.spec.mask(offset), cache.row_starts)
            layer_cache = layer_cache.write(offset, key, value)
            key, value = layer_cache.key.astype(key.dtype), layer_cache.value.astype(value.dtype)
        score = None
        if isinstance(self.positions, RelativeBias) and inputs.relative_bias_table is not None:
            score = self.positions(inputs.relative_bias_table, self.spec, offset)
        if inputs.bidirectional_ids is not None:
            # Pad to the cache's length: the remaining slots are empty.
            key_ids = jnp.pad(inputs.bidirectional_ids, [(0, 0), (0, key.shape[1] - x.shape[1])])
            mask = mask | segments(inputs.bidirectional_ids, key_ids)
        mask = mask & segments(inputs.segments, key_segments)
        return self._attend(query, key, value, mask, score, x.shape[-1], deterministic), layer_cache

    def _project(self, x: Float[Array, "B T inputs"], name: str, embed: int) -> Float[Array, "B T H D"]:
        """Return queries, keys or values, normalised if `config.qk_norm`; `embed` is E."""
        config, inputs = self.config, x.shape[-1]
        heads, axis = config.heads, "heads"
        if name != "query":
            heads, axis = config.kv_heads or config.heads, "kv_heads"
        shape, axes = (heads, config.head_dim or embed // config.heads), (axis, "head_dim")
        bias = config.has_bias(name)
        y = Linear((inputs,), shape, ("embed", *axes), self.std, bias, self.dtypes, name=name)(x)
        if not config.qk_norm or name == "value":
            return y
        norm_axes = axes if config.qk_norm == "whole" else ("norm",)
        return self.norm.build(self.dtypes, norm_axes, name=f"{name}_norm")(y)

    def _attend(
        self, query, key, value, mask: Mask, score: Score | None, embed: int, deterministic: bool
    ) -> Float[Array, "B T E"]:
        """Return the attention output projected to the model width `embed`."""
        config = self.config
        sinks = parameter(self, "sinks", (config.heads,), ("heads",), self.dtypes) if config.sinks else None
        use_dropout = config.dropout > 0 and not deterministic
        sow_weights = self.is_mutable_collection("intermediates")
        out = attend(
            query,
            key,
            value,
            mask=mask,
            score=[s for s in (score, softcap(config.softcap) if config.softcap else None) if s] or None,
            scale=config.scale or self.scale,
            sinks=sinks,
            dropout_rate=config.dropout,
            dropout_key=self.make_rng("dropout") if use_dropout else None,
            return_weights=sow_weights,
        )
        if sow_weights:
            out, weights = out
            self.sow("intermediates", "attention_weights", weights)
        axes, bias = ("heads", "head_dim", "embed"), config.has_bias("out")
        return Linear(out.shape[2:], (embed,), axes, self.out_std, bias, self.dtypes, name="out")(out)


class CrossAttention(Attention):
    """Cross-attention to the whole encoder output, without positions.

    Vaswani et al. 2017, section 3.2.3.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Return the layer's output and its cache, which holds the keys and values of the memory.

        `inputs.memory` replaces the contents of the cache; if it is None, the cache must hold them.
        """
        memory, embed = inputs.memory, x.shape[-1]
        query = self._project(x, "query", embed)
        if memory is not None:
            key, value = (self._project(memory.hidden, name, embed) for name in ("key", "value"))
            key_segments = memory.segments
            if layer_cache is not None:
                assert memory.mask is None, "a KV cache cannot hold memory.mask"
                cache_dtype = layer_cache.key.dtype
                layer_cache = KVCache(key.astype(cache_dtype), value.astype(cache_dtype))
        else:
            assert layer_cache is not None and inputs.cache is not None, (
                "cross-attention needs a memory or cache"
            )
            key, value = (y.astype(query.dtype) for y in (layer_cache.key, layer_cache.value))
            key_segments = inputs.cache.context
        mask = self.spec.mask() & segments(inputs.segments, key_segments)
        if memory is not None and memory.mask is not None:
            mask = mask & memory.mask
        return self._attend(query, key, value, mask, None, embed, deterministic), layer_cache


class PerceiverAttention(Attention):
    """Attention to the concatenation of the normalised memory and the tokens, without positions.

    The memory must have the model's width.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """Return the layer's output and the unchanged cache: this layer caches nothing."""
        memory, embed = inputs.memory, x.shape[-1]
        assert memory is not None, "Perceiver attention needs a memory"
        normed = self.norm.build(self.dtypes, name="memory_norm")(memory.hidden)
        memory_and_tokens = jnp.concatenate([normed, x], axis=1)
        query = self._project(x, "query", embed)
        key, value = (self._project(memory_and_tokens, name, embed) for name in ("key", "value"))
        key_segments = jnp.concatenate([memory.segments, inputs.segments], axis=1)
        mask = segments(inputs.segments, key_segments)
        return self._attend(query, key, value, mask, None, embed, deterministic), layer_cache
