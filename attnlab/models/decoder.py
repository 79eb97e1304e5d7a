"""Decoder language models: one config for GPT-2, Llama and what lies between."""

from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.cache import Cache, LayerCache, empty_layer
from attnlab.errors import InputError
from attnlab.layers.attention import Memory, NoPositions, Reading, RelativeBias, Rotary
from attnlab.layers.dropout import Dropout
from attnlab.layers.linear import Embedding, look_up
from attnlab.layers.norms import Norm
from attnlab.layers.readout import TokenStatistics, logits, token_statistics
from attnlab.models.base import TransformerConfig
from attnlab.sharding import constrain, out_sharding


@dataclass(frozen=True)
class Learned:
    """A learned vector for each of `length` positions, added to the embeddings."""

    length: int = 1024

    def __post_init__(self):
        if self.length < 1:
            raise ValueError("length must be at least 1")


@dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A decoder.

    Attributes:
      positions: `Rotary`, `Learned`, `RelativeBias` or `NoPositions`.
      vocab_size: tokens in the tables; None is as many as the tokenizer has.
      tied: whether the logits read from the embedding table.
      scale_embedding: multiply embeddings by sqrt(E) (Vaswani et al. 2017, section 3.4).
      logit_softcap: cap of the logits; None is none.
    """

    positions: Rotary | Learned | RelativeBias | NoPositions = field(default_factory=Rotary)
    vocab_size: int | None = None
    tied: bool = True
    scale_embedding: bool = False
    logit_softcap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.positions, Rotary) and self.head_dim * self.positions.fraction < 2:
            raise ValueError(f"rotary positions need a head_dim of at least 2 to turn; it is {self.head_dim}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError("logit_softcap must be over 0, or none")

    def check_length(self, length: int) -> None:
        """Checks that the model has positions for this many tokens.

        Raises:
          InputError: a learned table that is shorter.
        """
        if isinstance(self.positions, Learned) and length > self.positions.length:
            raise InputError(
                f"length {length} is over model.positions.length={self.positions.length} learned positions"
            )

    def sized(self, vocab_size: int) -> "DecoderConfig":
        """With the number of tokens in its tables, for a tokenizer of so many.

        Raises:
          InputError: tables that are smaller.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise InputError(
                f"model.vocab_size={self.vocab_size} is less than the {vocab_size} tokens of the tokenizer"
            )
        return replace(self, vocab_size=self.vocab_size or vocab_size)

    def build(self, vocab_size: int) -> "Decoder":
        """The module of this config for a tokenizer's vocabulary; raises as `sized` does."""
        sized = self.sized(vocab_size)
        return Decoder(self, sized.vocab_size or vocab_size)


class Decoder(nn.Module):
    """A language model: tokens in, logits of the next token out.

    Attributes:
      config: see `DecoderConfig`.
      vocab_size: tokens in the tables V.
      cross: whether every layer also attends to a memory.
    """

    config: DecoderConfig
    vocab_size: int
    cross: bool = False

    def setup(self):
        """Declares the tables, the stack of blocks and the last norm."""
        c = self.config
        self.embedding = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        if isinstance(c.positions, Learned):
            self.position_embedding = Embedding(
                c.positions.length, c.width, ("sequence", "embed"), c.init.std, c.dtypes
            )
        if isinstance(c.positions, RelativeBias):
            self.relative = Embedding(
                c.positions.buckets, c.attention.heads, ("window", "heads"), c.init.std, c.dtypes
            )
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        turned = NoPositions() if isinstance(c.positions, Learned) else c.positions
        self.layers = c.stack(turned, self.cross)
        self.norm = Norm(c.norm, c.dtypes)
        self.drop = Dropout(c.dropout)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        memory: Memory | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """Activations after the last norm, and the cache with these tokens in it.

        Args:
          tokens: ids.
          segment_ids: packed document of each token, 0 for padding; None is one document a row.
          positions: place of each token in its document; None is 0, 1, 2, ..., and after what
            the cache holds.
          cache: what was read before, from `init_cache`.
          deterministic: False drops out, with an rng named "dropout".
          memory: what the layers look at beside the tokens, if they have cross-attention. It is kept in a
            cache that is given: later calls may leave it out.
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
            if memory is not None:
                cache = replace(cache, context=memory.segments)
            shared = replace(cache, layers=None)
        relative = self.relative() if isinstance(self.config.positions, RelativeBias) else None
        reading = Reading(segment_ids, positions, shared, memory, relative)
        x, layer_caches = self.layers(x, layer_caches, reading, deterministic)
        if self.config.placement != "post":  # else the last block has ended with one
            x = self.norm(x)
        x = x * self.config.init.readout_scale(self.config.width)
        if cache is not None:
            cache = replace(cache, layers=layer_caches)
        return x, cache

    def __call__(
        self, tokens, segment_ids=None, positions=None, cache=None, deterministic=True, memory=None
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache | None]:
        """Logits of the token after each; with a cache, also the new cache. Arguments as of `hidden`."""
        x, new_cache = self.hidden(tokens, segment_ids, positions, cache, deterministic, memory)
        out = logits(x, self._table(), self.config.logit_softcap, self.config.dtypes.logits)
        return out if cache is None else (out, new_cache)

    def statistics(
        self, tokens, targets, segment_ids=None, positions=None, deterministic=True, memory=None
    ) -> TokenStatistics:
        """What a loss needs of each token's logits, without ever holding all of them."""
        x, _ = self.hidden(tokens, segment_ids, positions, None, deterministic, memory)
        return token_statistics(
            x, self._table(), targets, self.config.logit_softcap, self.config.dtypes.logits
        )

    def _table(self) -> Float[Array, "V E"]:
        return self.embedding() if self.config.tied else self.readout()

    def init_cache(self, batch: int, slots: int, memory: int = 0) -> Cache:
        """An empty cache for `slots` tokens of each of `batch` rows, and a memory of a length."""
        c = self.config
        periods, rest = divmod(c.depth, len(c.pattern))

        def empty(length: int) -> LayerCache:
            return empty_layer(batch, length, c.kv_heads, c.head_dim, c.dtypes.compute)

        one = (empty(slots), empty(memory)) if self.cross else empty(slots)
        where = out_sharding(None, "batch", None, "kv_heads", None)
        stacked = jax.tree.map(lambda x: jnp.zeros((periods, *x.shape), x.dtype, out_sharding=where), one)
        single = jax.tree.map(lambda x: constrain(x, "batch", None, "kv_heads", None), one)
        layers = ((stacked,) * len(c.pattern) if periods else None, (single,) * rest if rest else None)
        where = out_sharding("batch", None)
        segment_ids = jnp.zeros((batch, slots), jnp.int32, out_sharding=where)
        context = jnp.zeros((batch, memory), jnp.int32, out_sharding=where) if self.cross else None
        return Cache(layers, segment_ids, jnp.zeros((), jnp.int32), context)
