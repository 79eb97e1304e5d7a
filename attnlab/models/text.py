"""Models that read text: tables of tokens and positions, then a stack of blocks."""

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
    """A learned vector for each position, added to the embeddings: one of `length` rows of a table, of which
    the first `offset` are none's (RoBERTa, BART).
    """

    length: int = 1024
    offset: int = 0

    def __post_init__(self):
        if not 0 <= self.offset < self.length:
            raise ValueError("length must be at least 1, and offset at least 0 and under length")


@dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of the position, added to the embeddings (Vaswani et al. 2017, section 3.5).

    They stand side by side; with `halves`, all sines come first.
    """

    halves: bool = False


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A stack of blocks that reads tokens.

    Attributes:
      positions: `Rotary`, `Learned`, `Sinusoidal`, `RelativeBias` or `NoPositions`.
      vocab_size: tokens in the tables; None is as many as the tokenizer has.
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
            raise ValueError(f"rotary positions need a head_dim of at least 2 to turn; it is {self.head_dim}")

    def check_length(self, length: int) -> None:
        """Checks that the model has positions for this many tokens.

        Raises:
          InputError: a learned table that is shorter.
        """
        if isinstance(self.positions, Learned) and length > self.positions.length - self.positions.offset:
            rows, offset = self.positions.length, self.positions.offset
            less = f", less offset={offset}," if offset else ""
            raise InputError(f"length {length} is over positions.length={rows}{less} learned positions")

    @property
    def table_width(self) -> int:
        """Width of the tables of tokens and positions."""
        return self.width

    def canonical(self) -> Self:
        """See `ModelConfig.canonical`; a kind of layer has no positions of its own that are the model's."""
        config = super().canonical()
        pattern = (replace(k, positions=None) if k.positions == self.positions else k for k in config.pattern)
        return replace(config, pattern=tuple(pattern))

    def with_vocab_size(self, vocab_size: int) -> Self:
        """With the number of tokens in its tables, for a tokenizer of so many.

        Raises:
          InputError: tables that are smaller.
        """
        return set_vocab_size(self, vocab_size)


def set_vocab_size(config: Any, vocab_size: int) -> Any:
    """A config with its `vocab_size` set, for a tokenizer of so many tokens.

    Raises:
      InputError: tables that are smaller.
    """
    if config.vocab_size is not None and config.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size={config.vocab_size} is less than the {vocab_size} tokens of the tokenizer"
        )
    return replace(config, vocab_size=config.vocab_size or vocab_size)


class TextModel(nn.Module):
    """Tokens in, activations out; what families of text models are derived from.

    Attributes:
      config: see `TextConfig`.
      vocab_size: tokens in the tables V.
      cross: how the layers look at a memory, if they do.
    """

    config: TextConfig
    vocab_size: int
    cross: Cross | None = None

    def setup(self):
        """Declares the tables, the stack of blocks and the last norm."""
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
        of_layers = isinstance(c.positions, Rotary | RelativeBias)
        self.layers = c.stack(c.positions if of_layers else NoPositions(), self.cross)
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
        """What the layers start from; `added` is one more term of the sum of embeddings."""
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
        """Activations after the last norm, and the cache with these tokens in it.

        Args:
          tokens: ids.
          segment_ids: packed document of each token, 0 for padding; None is one document a row.
          positions: place of each token in its document; None is 0, 1, 2, ..., and after what
            the cache holds.
          cache: what was read before.
          deterministic: False drops out, with an rng named "dropout".
          memory: what the layers look at beside the tokens, if they have cross-attention. It is kept in a
            cache that is given: later calls may leave it out.
          table: of the tokens, where it is another model's; None is its own.
          added: one more term of the sum of embeddings, of the tables' width W.
          embedded: what the layers start from; None is what `embed` makes of the tokens.
          bidirectional_ids: see `SequenceInputs.bidirectional_ids`; only where the cache is
            empty.
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
        if self.config.placement != "post":  # else the last block has ended with one
            x = self.norm(x)
        return x, None if cache is None else replace(cache, layers=layer_caches)
