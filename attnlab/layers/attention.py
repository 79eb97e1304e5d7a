"""Multi-head attention as a module: projections, positions, cache, and one call of `attend`."""

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
    """Rotary positions over the first `fraction` of each head's width.

    `scaling` stretches the frequencies for lengths beyond those trained on; `interleaved` pairs neighbouring
    numbers of a head, in place of those half a head apart.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError("fraction must be over 0 and at most 1")

    def __call__(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Queries or keys turned by their positions."""
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
    """A learned term of every score for how far the key is from the query, in `buckets` that widen up to
    `max_distance`; one table for all layers (T5, arXiv 1910.10683, section 2.1).
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError("buckets must be at least 4, and max_distance over half of them")

    def __call__(self, table: Float[Array, "buckets H"], spec: "LayerSpec", first: Index) -> Score:
        """The score of a layer of this kind whose first query is at the key index `first`."""
        return t5_bias(table, bidirectional=not spec.causal, max_distance=self.max_distance, offset=first)


@dataclass(frozen=True)
class NoPositions:
    """Order is known from the mask alone (NoPE)."""


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Which tokens may attend to which in a layer. To try a new mask, derive one, in an experiment's file.

    Attributes:
      positions: how queries and keys are turned; None is the model's own way.
      cross_attends: whether the layer also looks at a memory, in a model whose layers do.
      causal: whether no token sees a later one, so that text can be generated.
    """

    positions: Rotary | NoPositions | None = field(default=None, kw_only=True)
    cross_attends: bool = field(default=True, kw_only=True)
    causal: ClassVar[bool] = True

    @abstractmethod
    def mask(self, first: Index = 0) -> Mask:
        """The pairs that may attend, the first query being at the key index `first`."""


@dataclass(frozen=True)
class Causal(LayerSpec):
    """Every token sees all earlier ones."""

    def mask(self, first=0):
        """See `LayerSpec.mask`."""
        return causal(first)


@dataclass(frozen=True)
class Sliding(LayerSpec):
    """Every token sees the last `window` tokens, itself included (Mistral, arXiv 2310.06825, section 2)."""

    window: int = 256

    def __post_init__(self):
        if self.window < 1:
            raise ValueError("window must be at least 1")

    def mask(self, first=0):
        """See `LayerSpec.mask`."""
        return window(self.window - 1, 0, first)


@dataclass(frozen=True)
class Bidirectional(LayerSpec):
    """Every token sees the whole document, or so many tokens before (`left`) and after it (`right`)."""

    left: int | None = None
    right: int | None = None
    causal: ClassVar[bool] = False

    def __post_init__(self):
        if min(self.left or 0, self.right or 0) < 0:
            raise ValueError("left and right must be at least 0, or none")

    def mask(self, first=0):
        """See `LayerSpec.mask`."""
        return window(self.left, self.right, first)


@dataclass(frozen=True)
class AttentionConfig:
    """How every attention layer of a model is made.

    Attributes:
      heads: query heads H.
      kv_heads: key/value heads K; None is H, 1 is multi-query attention.
      head_dim: width of a head D; None is E / H.
      bias: biases in the projections: all of them, or those of "qkv" (not the output's), "qvo" or "o" alone.
      qk_norm: the model's norm of queries and keys, each head by itself (arXiv 2010.04245, 2302.05442), or
        "whole", all heads together (OLMo 2, arXiv 2501.00656, section 3.2).
      softcap: cap of the scores; None is none.
      scale: factor of the scores; None is 1 / sqrt(D), or what the initialisation asks for.
      sinks: a learned logit in each head's softmax that no value belongs to (gpt-oss, arXiv 2508.10925).
      dropout: share of attention weights dropped in training.
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
        """Whether the projection "query", "key", "value" or "out" has a bias."""
        return projection[0] in self.bias if isinstance(self.bias, str) else self.bias

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError("heads must be at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads must divide heads={self.heads}: one of {', '.join(map(str, divisors))}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and under 1")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError("softcap must be over 0, or none")
        if self.scale is not None and self.scale <= 0:
            raise ValueError("scale must be over 0, or none")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderOutput:
    """What cross-attention looks at: an encoder's output, say.

    Attributes:
      hidden: its activations; their width need not be the model's.
      segments: which document each belongs to, 0 for padding: queries see those of their own.
      mask: which of those each query sees, such as `media`; None is all.
    """

    hidden: Float[Array, "B S M"]
    segments: Int[Array, "B S"]
    mask: Mask | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceInputs:
    """What all layers of a stack are given alike, beside the activations.

    Attributes:
      segments: packed document of each token, 0 for padding.
      positions: place of each token in its document.
      cache: of what was read before these tokens, without the layers' own parts; None if nothing was.
      memory: what cross-attention looks at; None where layers have none, or where their caches hold it.
      relative_bias_table: the table of `RelativeBias`.
      bidirectional_ids: tokens with the same id over 0 attend to each other in both directions in every layer
        (prefix LM); None disables this.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    cache: DecoderCache | None = None
    memory: EncoderOutput | None = None
    relative_bias_table: Float[Array, "buckets H"] | None = None
    bidirectional_ids: Int[Array, "B T"] | None = None


class Attention(nn.Module):
    """Attention of one layer; keys and values come from the same tokens or a cache of them.

    Attributes:
      config: heads and options.
      spec: which tokens may attend to which.
      positions: how queries and keys are turned.
      norm: of queries and keys, where the config asks for it.
      scale: factor of the scores where the config has none; None is 1 / sqrt(D).
      std: deviation of the initial query, key and value weights; `out_std` that of the output's.
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
        """The attended activations, and the layer's cache with the new keys and values in it."""
        query, key, value = (self._project(x, name, x.shape[-1]) for name in ("query", "key", "value"))
        if isinstance(self.positions, Rotary):
            query, key = (self.positions(y, inputs.positions) for y in (query, key))
        first: Index = 0
        mask, key_segments, cache = self.spec.mask(), inputs.segments, inputs.cache
        if cache is not None and layer_cache is not None:
            first, key_segments = cache.index - x.shape[1], cache.segments
            mask = shift_mask(self.spec.mask(first), cache.row_starts)
            layer_cache = layer_cache.write(first, key, value)
            key, value = layer_cache.key.astype(key.dtype), layer_cache.value.astype(value.dtype)
        score = None
        if isinstance(self.positions, RelativeBias) and inputs.relative_bias_table is not None:
            score = self.positions(inputs.relative_bias_table, self.spec, first)
        if inputs.bidirectional_ids is not None:
            keys = jnp.pad(
                inputs.bidirectional_ids, [(0, 0), (0, key.shape[1] - x.shape[1])]
            )  # slots yet to be filled
            mask = mask | segments(inputs.bidirectional_ids, keys)
        mask = mask & segments(inputs.segments, key_segments)
        return self._attend(query, key, value, mask, score, x.shape[-1], deterministic), layer_cache

    def _project(self, x: Float[Array, "B T inputs"], name: str, embed: int) -> Float[Array, "B T H D"]:
        """Queries, keys or values of a model of width `embed`, normalised if asked."""
        config, inputs = self.config, x.shape[-1]
        heads, axis = config.heads, "heads"
        if name != "query":
            heads, axis = config.kv_heads or config.heads, "kv_heads"
        shape, axes = (heads, config.head_dim or embed // config.heads), (axis, "head_dim")
        bias = config.has_bias(name)
        y = Linear((inputs,), shape, ("embed", *axes), self.std, bias, self.dtypes, name=name)(x)
        if not config.qk_norm or name == "value":
            return y
        over = axes if config.qk_norm == "whole" else ("norm",)
        return self.norm.build(self.dtypes, over, name=f"{name}_norm")(y)

    def _attend(
        self, query, key, value, mask: Mask, score: Score | None, embed: int, deterministic: bool
    ) -> Float[Array, "B T E"]:
        """What is attended to, mapped to the model's width `embed`."""
        config = self.config
        sinks = parameter(self, "sinks", (config.heads,), ("heads",), self.dtypes) if config.sinks else None
        uses_dropout = config.dropout > 0 and not deterministic
        captures = self.is_mutable_collection("intermediates")
        out = attend(
            query,
            key,
            value,
            mask=mask,
            score=[s for s in (score, softcap(config.softcap) if config.softcap else None) if s] or None,
            scale=config.scale or self.scale,
            sinks=sinks,
            dropout_rate=config.dropout,
            dropout_key=self.make_rng("dropout") if uses_dropout else None,
            return_weights=captures,
        )
        if captures:
            out, weights = out
            self.sow("intermediates", "attention_weights", weights)
        axes, bias = ("heads", "head_dim", "embed"), config.has_bias("out")
        return Linear(out.shape[2:], (embed,), axes, self.out_std, bias, self.dtypes, name="out")(out)


class CrossAttention(Attention):
    """Attention to a memory: to all of it, in no order (Vaswani et al. 2017, section 3.2.3)."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """The attended activations, and the layer's cache with the memory's keys and values in it.

        A memory that is given takes the place of what the cache has; where none is, the cache has it.
        """
        memory, embed = inputs.memory, x.shape[-1]
        query = self._project(x, "query", embed)
        if memory is not None:
            key, value = (self._project(memory.hidden, name, embed) for name in ("key", "value"))
            key_segments = memory.segments
            if layer_cache is not None:
                assert memory.mask is None, "a cache keeps no mask of its memory"
                cache_dtype = layer_cache.key.dtype
                layer_cache = KVCache(key.astype(cache_dtype), value.astype(cache_dtype))
        else:
            assert layer_cache is not None and inputs.cache is not None, "there is nothing to attend to"
            key, value = (y.astype(query.dtype) for y in (layer_cache.key, layer_cache.value))
            key_segments = inputs.cache.context
        mask = self.spec.mask() & segments(inputs.segments, key_segments)
        if memory is not None and memory.mask is not None:
            mask = mask & memory.mask
        return self._attend(query, key, value, mask, None, embed, deterministic), layer_cache


class PerceiverAttention(Attention):
    """Attention to a memory of the model's width, normalised, and beside it to the tokens; in no order."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], KVCache | None]:
        """The attended activations; nothing of them is kept in a cache."""
        memory, embed = inputs.memory, x.shape[-1]
        assert memory is not None, "there is nothing to attend to beside the tokens"
        memory_and_tokens = jnp.concatenate(
            [self.norm.build(self.dtypes, name="memory_norm")(memory.hidden), x], axis=1
        )
        query = self._project(x, "query", embed)
        key, value = (self._project(memory_and_tokens, name, embed) for name in ("key", "value"))
        key_segments = jnp.concatenate([memory.segments, inputs.segments], axis=1)
        mask = segments(inputs.segments, key_segments)
        return self._attend(query, key, value, mask, None, embed, deterministic), layer_cache
