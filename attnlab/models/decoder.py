"""Decoder-only language models, from config to logits: GPT-2, Llama and their variants.

From the top: the config, embeddings and the stack (`TextModel`), cache and logits (`Decoder`), a
block, its self-attention. Other families reuse these parts.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention import softcap
from attnlab.attention.absolute_positions import sinusoidal
from attnlab.attention.kv_cache import CachedKeys, DecoderCache, KVCache, LayerCache
from attnlab.attention.masks.base import Index
from attnlab.attention.scores import Score
from attnlab.layers.attention import (
    AttentionLayer,
    EncoderOutput,
    SegmentIds,
    SequenceInputs,
    documents,
    self_attention_mask,
)
from attnlab.layers.blocks import (
    BlockCache,
    BlockConfig,
    Cross,
    CrossAttentionConfig,
    GatedCrossAttentionConfig,
    LayerStack,
    PerceiverAttentionConfig,
)
from attnlab.layers.cross_attention import CROSS_SPEC, CrossAttention, PerceiverAttention
from attnlab.layers.experts import Experts, ExpertsConfig
from attnlab.layers.linear import Bias, Dropout, Embedding, look_up, parameter, scaled
from attnlab.layers.scores import ScoreInputs, ScoreModule, score_names
from attnlab.layers.specs import (
    Causal,
    FirstValue,
    LayerSpec,
    Learned,
    Mixer,
    NoPositions,
    RelativeBias,
    Rotary,
    Sinusoidal,
)
from attnlab.models.config import Model, TextConfig, TransformerConfig
from attnlab.models.generation_defaults import GenerationDefaults
from attnlab.sharding import constrain, gather_length, out_sharding


@dataclass(frozen=True)
class DecoderConfig(TextConfig):
    """A decoder-only language model.

    Attributes:
      tied: whether the logits use the embedding table as their weights.
      scale_readout: divide activations by sqrt(E) before the logits (T5).
      readout_bias: add a learned bias to each logit.
      logit_softcap: softcap of the logits; None disables it.
      generation: suppressed and end tokens of generation; those of a decoder that is part of an
        encoder-decoder belong to the whole model.
    """

    tied: bool = True
    scale_readout: bool = False
    readout_bias: bool = False
    logit_softcap: float | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self):
        super().__post_init__()
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be over 0, or none, not {self.logit_softcap}")

    def build(self, vocab_size: int, cross: Cross | None = None) -> "Decoder":
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does.

        Args:
          vocab_size: number of tokens of the tokenizer.
          cross: kind of cross-attention; None disables it.
        """
        return Decoder(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size, cross)

    def empty_cache(self, batch: int, slots: int, cross: bool = False) -> DecoderCache:
        """Return an empty KV cache for `batch` rows of `slots` tokens.

        With `cross`, the first call with an encoder output also caches its keys and values.
        """
        repeats = self.num_stacked_repeats
        rest = self.layer_specs[repeats * len(self.pattern) :]
        sizes = (self.attention.heads, self.kv_heads, self.head_dim, self.dtypes.compute)

        def empty(spec: LayerSpec, layers: int | None):
            own = spec.empty_cache(batch, slots, *sizes, layers)
            return (own, Causal().empty_cache(batch, 0, *sizes, layers)) if cross else own

        layers = (
            tuple(empty(spec, repeats) for spec in self.pattern) if repeats else None,
            tuple(empty(spec, None) for spec in rest) or None,
        )
        spec = out_sharding("batch", None)
        segment_ids = jnp.zeros((batch, slots), jnp.int32, out_sharding=spec)
        context = jnp.zeros((batch, 0), jnp.int32, out_sharding=spec) if cross else None
        return DecoderCache(layers, segment_ids, jnp.zeros((), jnp.int32), context)


class TextModel(Model):
    """Base module of text models: maps tokens to activations.

    Attributes:
      config: see `TextConfig`.
      vocab_size: number of tokens V in the embedding table.
      cross: kind of cross-attention; None disables it.
    """

    config: TextConfig
    vocab_size: int
    cross: Cross | None = None

    def setup(self):
        """Declare the embedding tables, the stack of blocks and the final norm."""
        c = self.config
        self.embedding = self._table(self.vocab_size, "vocab")
        if isinstance(c.positions, Learned):
            self.position_embedding = self._table(c.positions.length, "sequence")
        if isinstance(c.positions, RelativeBias):
            self.relative = Embedding(
                c.positions.buckets, c.attention.heads, ("window", "heads"), c.init.std, c.dtypes, wide=True
            )
        if c.embedding_norm:
            self.embedding_norm = c.norm.build(c.dtypes)
        in_attention = isinstance(c.positions, Rotary | RelativeBias)
        self.layers = self.stack(c.positions if in_attention else NoPositions())
        self.norm = c.norm.build(c.dtypes)
        self.drop = Dropout(c.dropout)

    def stack(self, positions: Rotary | RelativeBias | NoPositions) -> LayerStack:
        """Return the module of all layers."""
        return layer_stack(self.config, positions, self.cross)

    def _table(self, size: int, axis: str) -> Embedding:
        c = self.config
        return Embedding(size, c.table_width, (axis, "embed"), c.init.std, c.dtypes)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        deterministic: bool,
        table: Float[Array, "V E"] | None = None,
        added: Float[Array, "B T W"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Return the input of the first layer; `added` is an additional embedding of each token."""
        c = self.config
        tokens = constrain(tokens, "batch", "sequence")
        if table is None and not getattr(self.config, "tied", False):
            x = self.embedding(tokens)
        else:  # the logits need the whole table anyway
            x = look_up(self.embedding() if table is None else table, tokens)
        if c.scale_embedding:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if isinstance(c.positions, Learned):
            x = x + look_up(self.position_embedding(), positions + c.positions.offset)
        if isinstance(c.positions, Sinusoidal):
            x = x + sinusoidal(positions, c.table_width, c.positions.halves).astype(x.dtype)
        if added is not None:
            x = x + added
        x = constrain(x, "batch", "residual", None)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        return self.drop(x, deterministic=deterministic)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        cache: DecoderCache | None = None,
        deterministic: bool = True,
        memory: EncoderOutput | None = None,
        table: Float[Array, "V E"] | None = None,
        added: Float[Array, "B T W"] | None = None,
        embedded: Float[Array, "B T E"] | None = None,
        bidirectional_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], DecoderCache | None]:
        """Return activations after the final norm, and the updated cache or None.

        Args:
          tokens: see `Model`, like the next arguments.
          segment_ids: see `Model`.
          positions: see `Model`.
          cache: KV cache of the preceding tokens.
          deterministic: see `Model`.
          memory: encoder output for cross-attention. A given cache stores its keys and values, so
            later calls may omit it.
          table: embedding table of another model; None uses the model's own.
          added: additional embedding of each token, of the tables' width W.
          embedded: input of the first layer; None means the output of `embed`.
          bidirectional_ids: see `SequenceInputs`; supported only with an empty cache or none.
        """
        rows = documents(segment_ids, tokens)
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1])[None]
            if cache is not None:
                before = jnp.sum(cache.segments > 0, axis=1, keepdims=True, dtype=jnp.int32)
                counts = jnp.cumsum(rows.ids > 0, axis=1, dtype=jnp.int32)
                positions = jnp.maximum(before + counts - 1, 0)
        positions = constrain(positions, "batch", "sequence")
        if embedded is None:
            embedded = self.embed(tokens, positions, deterministic=deterministic, table=table, added=added)
        embedded = constrain(embedded, "batch", "residual", None)
        layer_caches, shared = None, None
        if cache is not None:
            layer_caches, cache = cache.layers, cache.advance(rows.ids)
            if memory is not None:
                cache = replace(cache, context=constrain(memory.segments, "batch", None))
            shared = replace(cache, layers=None)
        relative_bias_table = self.relative() if isinstance(self.config.positions, RelativeBias) else None
        inputs = SequenceInputs(rows, positions, shared, memory, relative_bias_table, bidirectional_ids)
        x, layer_caches = self.layers(embedded, layer_caches, inputs, deterministic)
        if self.config.placement != "post":  # with "post", the last block already ends with a norm
            x = self.norm(x)
        return x, None if cache is None else replace(cache, layers=layer_caches)


class Decoder(TextModel):
    """A decoder-only language model: maps tokens to next-token logits."""

    config: DecoderConfig

    def setup(self):
        """Declare the layers of `TextModel`, and the table and bias of the logits."""
        super().setup()
        c = self.config
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        if c.readout_bias:
            self.readout_bias = Bias(self.vocab_size, c.dtypes)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        cache: DecoderCache | None = None,
        deterministic: bool = True,
        memory: EncoderOutput | None = None,
        embedded: Float[Array, "B T E"] | None = None,
        bidirectional_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], DecoderCache]:
        """Return activations before the logits; see `Model` and `TextModel.forward`."""
        x, new_cache = self.forward(
            tokens,
            segment_ids,
            positions,
            cache=cache,
            deterministic=deterministic,
            memory=memory,
            embedded=embedded,
            bidirectional_ids=bidirectional_ids,
        )
        c = self.config
        x = scaled(x, c.init.readout_scale(c.width) / (c.width**0.5 if c.scale_readout else 1.0))
        return x if new_cache is None else (gather_length(x), new_cache)

    def readout_weights(self):
        """See `Model.readout_weights`."""
        c = self.config
        table = (self.embedding if c.tied else self.readout)(gather=False)
        return table, self.readout_bias() if c.readout_bias else None, c.logit_softcap, c.dtypes.logits

    def init_cache(self, batch: int, slots: int) -> DecoderCache:
        """See `DecoderConfig.empty_cache`."""
        return self.config.empty_cache(batch, slots, self.cross is not None)


def layer_stack(
    config: TransformerConfig,
    positions: Rotary | RelativeBias | NoPositions = NoPositions(),  # noqa: B008 - frozen
    cross: Cross | None = None,
    **options: Any,
) -> LayerStack:
    """Return the module of all layers of a model; `options` are other attributes of `LayerStack`.

    The layers whose spec has no positions have `positions`. `cross` None disables cross-attention.
    """
    return LayerStack(
        Block,
        config.block(positions, cross),
        config.pattern,
        config.scan,
        config.remat,
        unrolled=config.unrolled,
        **options,
    )


class Block(nn.Module):
    """A residual block: self-attention, MLP or experts, and optionally cross-attention.

    `skip_attention_norm` omits the norm before self-attention.
    """

    config: BlockConfig
    spec: LayerSpec
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], inputs: SequenceInputs, layer_cache: BlockCache | None
    ) -> tuple[Float[Array, "B T E"], BlockCache | None, FirstValue | None]:
        """Return the activations after the block, its cache, and the first layer's values."""
        self.sow("intermediates", "hidden", x)
        self_cache, cross_cache = layer_cache if isinstance(layer_cache, tuple) else (layer_cache, None)
        cross = self.config.cross if self.spec.cross_attends else None
        if isinstance(cross, GatedCrossAttentionConfig):
            x, cross_cache = self._cross_attend(x, inputs, cross_cache, gated=True)
            y = self._feed_forward(self._pre_norm(x, "cross_feed_forward"), inputs, "cross_feed_forward")
            x = self._residual(x, y, "cross_feed_forward", gated=True)
        positions = self.spec.positions or self.config.positions
        layer = PerceiverAttention if isinstance(cross, PerceiverAttentionConfig) else SelfAttention
        attention = self._attention(layer, "attention", self.spec, positions)
        y, self_cache, first_value = attention(
            self._pre_norm(x, "attention"), inputs, self_cache, self.deterministic
        )
        x = self._residual(x, y, "attention")
        if isinstance(cross, CrossAttentionConfig):
            x, cross_cache = self._cross_attend(x, inputs, cross_cache)
        y = self._feed_forward(self._pre_norm(x, "feed_forward"), inputs, "feed_forward")
        x = self._residual(x, y, "feed_forward")
        new_cache = (self_cache, cross_cache) if isinstance(layer_cache, tuple) else self_cache
        return x, new_cache, first_value

    def _cross_attend(self, x, inputs: SequenceInputs, cross_cache: LayerCache | None, gated: bool = False):
        """Return the activations after a cross-attention branch, and the branch's cache."""
        layer = self._attention(CrossAttention, "cross_attention", CROSS_SPEC, NoPositions())
        normed = self._pre_norm(x, "cross_attention")
        y, cross_cache, _ = layer(normed, inputs, cross_cache, self.deterministic)
        return self._residual(x, y, "cross_attention", gated), cross_cache

    def _attention(
        self, layer: type[AttentionLayer], name: str, spec: LayerSpec, positions
    ) -> AttentionLayer:
        c = self.config
        scale = c.init.attention_scale(c.attention.head_dim or c.width // c.attention.heads)
        return layer(c.attention, spec, positions, c.norm, scale, *self._std, c.dtypes, name=name)

    def _feed_forward(
        self, x: Float[Array, "B T E"], inputs: SequenceInputs, name: str
    ) -> Float[Array, "B T E"]:
        c = self.config
        if isinstance(c.feed_forward, ExpertsConfig):
            return Experts(c.feed_forward, *self._std, c.dtypes, name=name)(x, inputs.segments > 0)
        return c.feed_forward.build(*self._std, c.dtypes, name=name)(x)

    @property
    def _std(self) -> tuple[float, float]:
        """Standard deviations of initial weights: in general, and of a branch's last projection."""
        std = self.config.init.hidden_std(self.config.width)
        return std, std / (2 * self.config.depth) ** 0.5

    def _pre_norm(self, x: Float[Array, "B T E"], branch: str) -> Float[Array, "B T E"]:
        """Return the input of a branch: the residual stream, normalised if `placement` says so."""
        skip = self.skip_attention_norm and branch == "attention"
        return self._norm(x, branch) if self.config.placement in ("pre", "both") and not skip else x

    def _residual(
        self, x: Float[Array, "B T E"], y: Float[Array, "B T E"], branch: str, gated: bool = False
    ) -> Float[Array, "B T E"]:
        """Return the residual stream `x` plus the output `y` of a branch."""
        c = self.config
        if c.placement in ("both", "branch"):
            y = self._norm(y, f"{branch}_out")
        if c.layer_scale is not None:
            name = f"{branch}_layer_scale"
            scale = parameter(self, name, (c.width,), ("norm",), c.dtypes, mean=c.layer_scale, wide=True)
            y = (y * scale[None, None]).astype(y.dtype)
        if gated:
            gate = parameter(self, f"{branch}_gate", (1,), ("norm",), c.dtypes, wide=True)
            y = (y * jnp.tanh(gate)[None, None]).astype(y.dtype)
        x = x + Dropout(c.dropout)(y, deterministic=self.deterministic)
        return self._norm(x, branch) if c.placement == "post" else x

    def _norm(self, x: Float[Array, "B T E"], name: str) -> Float[Array, "B T E"]:
        return self.config.norm.build(self.config.dtypes, name=f"{name}_norm")(x)


class SelfAttention(AttentionLayer):
    """Self-attention of one layer, with an optional KV cache."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        inputs: SequenceInputs,
        layer_cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], LayerCache | None, FirstValue | None]:
        """Return the layer's output, its KV cache with the new keys and values appended, and the
        first layer's values for the next layer.
        """
        spec, mixer = self.spec, self.spec.mixer or Mixer()

        def rotate(y: Array) -> Array:
            return self.positions(y, inputs.positions) if isinstance(self.positions, Rotary) else y

        query, key, value = mixer.project(self, x, rotate)
        value, first_value = mixer.mix_values(self, value, inputs.first_value)
        offset: Index = 0
        cached, cache = CachedKeys(key, value), inputs.cache
        if cache is not None and layer_cache is not None:
            offset = cache.index - x.shape[1]
            layer_cache, cached = layer_cache.append(offset, key, value, cache.row_starts)
        mask = self_attention_mask(spec, inputs, cached)
        stored = layer_cache if isinstance(layer_cache, KVCache) else None
        state: dict[str, Array] = {}

        def score_of(query: Array, key: Array) -> list[Score | None] | None:
            scores: list[Score | None] = []
            if isinstance(self.positions, RelativeBias) and inputs.relative_bias_table is not None:
                scores.append(cached.score(self.positions(inputs.relative_bias_table, spec, offset)))
            for name, config in score_names(spec.scores) if spec.scores else ():
                scale = self._scale or query.shape[-1] ** -0.5
                given = ScoreInputs(x, query, key, inputs.positions, mask, scale, spec.causal, offset)
                score, new_state = ScoreModule(config, self.dtypes, name=name)(given, stored)
                scores.append(cached.score(score))
                state.update(new_state)
            scores += [softcap(self.config.softcap)] if self.config.softcap else []
            return scores or None

        options = self._options(mask, inputs.block_masks.get(spec), deterministic)
        out = self._sow_weights(mixer.attend(self, query, cached.key, cached.value, score_of, **options))
        if stored is not None:
            layer_cache = replace(stored, state=state)
        return self._project_out(mixer.output(self, x, out), x.shape[-1]), layer_cache, first_value
