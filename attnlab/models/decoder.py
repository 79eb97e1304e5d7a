"""Decoder language models: one config for GPT-2, Llama and what lies between."""

from dataclasses import dataclass, field, replace
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.cache import Cache, empty_layer
from attnlab.errors import InputError
from attnlab.layers.attention import Attention, Causal, Kind, NoPositions, Rotary
from attnlab.layers.blocks import BlockConfig, Placement, Stack
from attnlab.layers.dropout import Dropout
from attnlab.layers.experts import Experts
from attnlab.layers.feed_forward import MLP, GatedMLP
from attnlab.layers.initialization import MuP, Normal
from attnlab.layers.linear import Embedding, look_up
from attnlab.layers.norms import LayerNorm, Norm, RMSNorm
from attnlab.layers.parameters import Dtypes
from attnlab.layers.readout import TokenStatistics, logits, token_statistics
from attnlab.sharding import constrain, out_sharding


@dataclass(frozen=True)
class Learned:
    """A learned vector for each of `length` positions, added to the embeddings."""

    length: int = 1024

    def __post_init__(self):
        if self.length < 1:
            raise ValueError("length must be at least 1")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Attributes:
      depth: number of layers L.
      width: model width E.
      attention: heads and options of every attention layer.
      feed_forward: `MLP`, `GatedMLP` or `Experts`.
      norm: `RMSNorm` or `LayerNorm`.
      placement: where norms stand; see `BlockConfig`.
      positions: `Rotary`, `Learned` or `NoPositions`.
      pattern: kinds of attention, repeated over the layers: five `Sliding` then one `Causal`, say.
      vocab_size: tokens in the tables; None is as many as the tokenizer has.
      tied: whether the logits read from the embedding table.
      scale_embedding: multiply embeddings by sqrt(E) (Vaswani et al. 2017, section 3.4).
      logit_softcap: cap of the logits; None is none.
      dropout: share of embeddings and residual branches dropped in training.
      init: `Normal` or `MuP`.
      dtypes: number formats of parameters, computation and logits.
      remat: what the backward pass recomputes: nothing, all of a layer, or all but its matrix products.
      scan: compile one period of the pattern and loop over it, instead of compiling every layer.
    """

    depth: int = 6
    width: int = 256
    attention: Attention = field(default_factory=Attention)
    feed_forward: MLP | GatedMLP | Experts = field(default_factory=MLP)
    norm: RMSNorm | LayerNorm = field(default_factory=RMSNorm)
    placement: Placement = "pre"
    positions: Rotary | Learned | NoPositions = field(default_factory=Rotary)
    pattern: tuple[Kind, ...] = (Causal(),)
    vocab_size: int | None = None
    tied: bool = True
    scale_embedding: bool = False
    logit_softcap: float | None = None
    dropout: float = 0.0
    init: Normal | MuP = field(default_factory=Normal)
    dtypes: Dtypes = field(default_factory=Dtypes)
    remat: Literal["none", "full", "dots"] = "none"
    scan: bool = True

    def __post_init__(self):
        if self.depth < 1 or self.width < 1:
            raise ValueError("depth and width must be at least 1")
        if self.attention.head_dim is None and self.width % self.attention.heads:
            raise ValueError(
                f"width={self.width} is no multiple of attention.heads={self.attention.heads}: change one, "
                "or set attention.head_dim"
            )
        if isinstance(self.positions, Rotary) and self.head_dim * self.positions.fraction < 2:
            raise ValueError(f"rotary positions need a head_dim of at least 2 to turn; it is {self.head_dim}")
        if not self.pattern:
            raise ValueError("pattern must name at least one kind of attention")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and under 1")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError("logit_softcap must be over 0, or none")

    @property
    def head_dim(self) -> int:
        """Width of a head D."""
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.attention.kv_heads or self.attention.heads

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def causal(self) -> bool:
        """Whether no layer looks ahead, so that text can be generated."""
        return all(kind.causal for kind in self.pattern)

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """Fields whose sizes a mesh must be able to cut: field -> (logical axis, size)."""
        feed_forward = {"model.feed_forward.width": ("mlp", self.feed_forward.hidden(self.width))}
        if isinstance(self.feed_forward, Experts):
            feed_forward = {"model.feed_forward.experts": ("experts", self.feed_forward.experts)}
        return {
            "model.width": ("embed", self.width),
            "model.attention.heads": ("heads", self.attention.heads),
            "model.attention.kv_heads": ("kv_heads", self.kv_heads),
            **feed_forward,
        }

    def check_length(self, length: int) -> None:
        """Checks that the model has positions for this many tokens.

        Raises:
          InputError: a learned table that is shorter.
        """
        if isinstance(self.positions, Learned) and length > self.positions.length:
            raise InputError(
                f"length {length} is over model.positions.length={self.positions.length} learned positions"
            )

    def build(self, vocab_size: int) -> "Decoder":
        """The module of this config for a tokenizer's vocabulary.

        Raises:
          InputError: a table that is smaller.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise InputError(
                f"model.vocab_size={self.vocab_size} is less than the {vocab_size} tokens of the tokenizer"
            )
        return Decoder(self, self.vocab_size or vocab_size)


class Decoder(nn.Module):
    """A language model: tokens in, logits of the next token out."""

    config: DecoderConfig
    vocab_size: int

    def setup(self):
        """Declares the tables, the stack of blocks and the last norm."""
        c = self.config
        self.embedding = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        if isinstance(c.positions, Learned):
            self.position_embedding = Embedding(
                c.positions.length, c.width, ("sequence", "embed"), c.init.std, c.dtypes
            )
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        turned = NoPositions() if isinstance(c.positions, Learned) else c.positions
        block = BlockConfig(
            width=c.width,
            depth=c.depth,
            attention=c.attention,
            feed_forward=c.feed_forward,
            norm=c.norm,
            placement=c.placement,
            positions=turned,
            dropout=c.dropout,
            init=c.init,
            dtypes=c.dtypes,
        )
        self.layers = Stack(block, c.pattern, c.scan, c.remat)
        self.norm = Norm(c.norm, c.dtypes)
        self.drop = Dropout(c.dropout)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """Activations after the last norm, and the cache with these tokens in it.

        Args:
          tokens: ids.
          segment_ids: packed document of each token, 0 for padding; None is one document a row.
          positions: place of each token in its document; None is 0, 1, 2, ..., and after what
            the cache holds.
          cache: what was read before, from `init_cache`.
          deterministic: False drops out, with an rng named "dropout".
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1])[None]
            if cache is not None:
                before = jnp.sum(cache.segments > 0, axis=1, keepdims=True)
                positions = jnp.maximum(before + jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
        segment_ids, positions = (constrain(a, "batch", "sequence") for a in (segment_ids, positions))
        x = look_up(self.embedding(), tokens)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        if isinstance(self.config.positions, Learned):
            x = x + look_up(self.position_embedding(), positions)
        x = self.drop(constrain(x, "batch", "sequence", None), deterministic=deterministic)
        layer_caches, shared = None, None
        if cache is not None:
            layer_caches, cache = cache.layers, cache.advance(segment_ids)
            shared = replace(cache, layers=None)
        x, layer_caches = self.layers(x, layer_caches, segment_ids, positions, shared, deterministic)
        if self.config.placement != "post":  # else the last block has ended with one
            x = self.norm(x)
        x = x * self.config.init.readout_scale(self.config.width)
        if cache is not None:
            cache = replace(cache, layers=layer_caches)
        return x, cache

    def __call__(
        self, tokens, segment_ids=None, positions=None, cache=None, deterministic=True
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache | None]:
        """Logits of the token after each; with a cache, also the new cache. Arguments as of `hidden`."""
        x, new_cache = self.hidden(tokens, segment_ids, positions, cache, deterministic)
        out = logits(x, self._table(), self.config.logit_softcap, self.config.dtypes.logits)
        return out if cache is None else (out, new_cache)

    def statistics(
        self, tokens, targets, segment_ids=None, positions=None, deterministic=True
    ) -> TokenStatistics:
        """What a loss needs of each token's logits, without ever holding all of them."""
        x, _ = self.hidden(tokens, segment_ids, positions, None, deterministic)
        return token_statistics(
            x, self._table(), targets, self.config.logit_softcap, self.config.dtypes.logits
        )

    def _table(self) -> Float[Array, "V E"]:
        return self.embedding() if self.config.tied else self.readout()

    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens of each of `batch` rows."""
        c = self.config
        periods, rest = divmod(c.depth, len(c.pattern))
        one = empty_layer(batch, slots, c.kv_heads, c.head_dim, c.dtypes.compute)
        where = out_sharding(None, "batch", None, "kv_heads", None)
        stacked = jax.tree.map(lambda x: jnp.zeros((periods, *x.shape), x.dtype, out_sharding=where), one)
        single = jax.tree.map(lambda x: constrain(x, "batch", None, "kv_heads", None), one)
        layers = ((stacked,) * len(c.pattern) if periods else None, (single,) * rest if rest else None)
        segment_ids = jnp.zeros((batch, slots), jnp.int32, out_sharding=out_sharding("batch", None))
        return Cache(layers, segment_ids, jnp.zeros((), jnp.int32))
