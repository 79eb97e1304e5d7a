"""Base of Transformers over text: token and position embeddings, and a stack of blocks."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import DecoderCache
from attnlab.attention.positions import sinusoidal
from attnlab.errors import InputError
from attnlab.layers.attention import EncoderOutput, NoPositions, RelativeBias, Rotary, SequenceInputs
from attnlab.layers.blocks import Cross
from attnlab.layers.dropout import Dropout
from attnlab.layers.linear import Embedding, look_up
from attnlab.models.base import TransformerConfig
from attnlab.sharding import constrain


@dataclass(frozen=True)
class Learned:
    """Learned absolute position embeddings, added to the token embeddings.

    Attributes:
      length: rows of the table.
      offset: first rows that no position uses (RoBERTa, BART).
    """

    length: int = 1024
    offset: int = 0

    def __post_init__(self):
        if not 0 <= self.offset < self.length:
            raise ValueError(f"offset={self.offset} must be at least 0 and under length={self.length}")


@dataclass(frozen=True)
class Sinusoidal:
    """Sinusoidal position embeddings, added to the token embeddings.

    Vaswani et al. 2017, section 3.5.

    Attributes:
      halves: order all sines before all cosines, instead of interleaving them.
    """

    halves: bool = False


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A Transformer over text tokens.

    Attributes:
      positions: `Rotary`, `Learned`, `Sinusoidal`, `RelativeBias` or `NoPositions`.
      vocab_size: number of tokens in the embedding table; None means that of the tokenizer.
      scale_embedding: multiply embeddings by sqrt(E) (Vaswani et al. 2017, section 3.4).
      embedding_norm: normalise the sum of the embeddings.
    """

    positions: Rotary | Learned | Sinusoidal | RelativeBias | NoPositions = field(default_factory=Rotary)
    vocab_size: int | None = None
    scale_embedding: bool = False
    embedding_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.positions, Rotary) and self.head_dim * self.positions.fraction < 2:
            raise ValueError(
                f"positions=Rotary must rotate at least 2 components of a head, but "
                f"head_dim={self.head_dim} times fraction={self.positions.fraction} is less"
            )

    def check_length(self, length: int) -> None:
        """Check that the model has positions for `length` tokens.

        Raises:
          InputError: the learned position table is shorter.
        """
        if isinstance(self.positions, Learned) and length > self.positions.length - self.positions.offset:
            rows, offset = self.positions.length, self.positions.offset
            minus = f" minus offset={offset}" if offset else ""
            raise InputError(f"length {length} exceeds positions.length={rows}{minus} learned positions")

    @property
    def table_width(self) -> int:
        """Width of the tables of tokens and positions."""
        return self.width

    def canonical(self) -> Self:
        """See `ModelConfig.canonical`; specs whose positions equal the model's get None."""
        config = super().canonical()
        pattern = (replace(k, positions=None) if k.positions == self.positions else k for k in config.pattern)
        return replace(config, pattern=tuple(pattern))

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return the config with `vocab_size` set; see `set_vocab_size`.

        Raises:
          InputError: the config's own `vocab_size` is smaller.
        """
        return set_vocab_size(self, vocab_size)


def set_vocab_size(config: Any, vocab_size: int) -> Any:
    """Return the config with `vocab_size` set to that of a tokenizer, unless it is set already.

    Raises:
      InputError: the config's own `vocab_size` is smaller.
    """
    if config.vocab_size is not None and config.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size={config.vocab_size} is less than the {vocab_size} tokens of the tokenizer"
        )
    return replace(config, vocab_size=config.vocab_size or vocab_size)


class TextModel(nn.Module):
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
                c.positions.buckets, c.attention.heads, ("window", "heads"), c.init.std, c.dtypes
            )
        if c.embedding_norm:
            self.embedding_norm = c.norm.build(c.dtypes)
        in_attention = isinstance(c.positions, Rotary | RelativeBias)
        self.layers = c.stack(c.positions if in_attention else NoPositions(), self.cross)
        self.norm = c.norm.build(c.dtypes)
        self.drop = Dropout(c.dropout)

    def _table(self, size: int, axis: str) -> Embedding:
        c = self.config
        return Embedding(size, c.table_width, (axis, "embed"), c.init.std, c.dtypes)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        deterministic: bool,
        table: Float[Array, "V E"] | None = None,
        added: Float[Array, "B T W"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Return the input of the first layer; `added` is an additional embedding of each token."""
        c = self.config
        x = look_up(self.embedding() if table is None else table, tokens)
        if c.scale_embedding:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if isinstance(c.positions, Learned):
            x = x + look_up(self.position_embedding(), positions + c.positions.offset)
        if isinstance(c.positions, Sinusoidal):
            x = x + sinusoidal(positions, c.table_width, c.positions.halves).astype(x.dtype)
        if added is not None:
            x = x + added
        x = constrain(x, "batch", "sequence", None)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        return self.drop(x, deterministic=deterministic)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "B T"] | None,
        cache: DecoderCache | None = None,
        deterministic: bool = True,
        memory: EncoderOutput | None = None,
        table: Float[Array, "V E"] | None = None,
        added: Float[Array, "B T W"] | None = None,
        embedded: Float[Array, "B T E"] | None = None,
        bidirectional_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], DecoderCache | None]:
        """Return activations after the final norm, and the updated cache.

        Args:
          tokens: token ids.
          segment_ids: document id of each token in a packed row, 0 at padding; None means one
            document per row.
          positions: position of each token in its document; None counts from 0, or from the number
            of tokens in the cache.
          cache: KV cache of the preceding tokens; None returns no cache.
          deterministic: disable dropout; otherwise an rng named "dropout" is needed.
          memory: encoder output for cross-attention. A given cache stores its keys and values, so
            later calls may omit it.
          table: embedding table of another model; None uses the model's own.
          added: additional embedding of each token, of the tables' width W.
          embedded: input of the first layer; None means the output of `embed`.
          bidirectional_ids: see `SequenceInputs`; supported only with an empty cache or none.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1])[None]
            if cache is not None:
                before = jnp.sum(cache.segments > 0, axis=1, keepdims=True)
                positions = jnp.maximum(before + jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
        segment_ids, positions = (constrain(a, "batch", "sequence") for a in (segment_ids, positions))
        if embedded is None:
            embedded = self.embed(tokens, positions, deterministic, table, added)
        layer_caches, shared = None, None
        if cache is not None:
            layer_caches, cache = cache.layers, cache.advance(segment_ids)
            if memory is not None:
                cache = replace(cache, context=constrain(memory.segments, "batch", None))
            shared = replace(cache, layers=None)
        relative_bias_table = self.relative() if isinstance(self.config.positions, RelativeBias) else None
        inputs = SequenceInputs(
            segment_ids, positions, shared, memory, relative_bias_table, bidirectional_ids
        )
        x, layer_caches = self.layers(embedded, layer_caches, inputs, deterministic)
        if self.config.placement != "post":  # with "post", the last block already ends with a norm
            x = self.norm(x)
        return x, None if cache is None else replace(cache, layers=layer_caches)
