"""Encoder-decoders of recurrent layers: translation before attention, and with the first there was."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError
from attnlab.layers.alignment import AdditiveConfig, AlignedStack, DotConfig, GeneralConfig, NoAttention
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.recurrent import RecurrentStack
from attnlab.models.base import TokenFlops
from attnlab.models.recurrent import Recurrent, RecurrentCache, RecurrentConfig


@dataclass(frozen=True)
class RecurrentSeq2SeqConfig(RecurrentConfig):
    """An encoder of a source, and a decoder that starts from its last states.

    Both have `depth` layers, and read by one table of tokens. The decoder may attend to all that the encoder
    gave out.

    Attributes:
      attention: `NoAttention`, `AdditiveConfig`, `GeneralConfig` or `DotConfig`.
      bidirectional: whether the encoder reads the source forwards and backwards, with half the width each.
    """

    attention: NoAttention | AdditiveConfig | GeneralConfig | DotConfig = field(
        default_factory=AdditiveConfig
    )
    bidirectional: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.bidirectional and self.width % 2:
            raise ValueError(f"bidirectional needs an even width, not {self.width}")

    def build(self, vocab_size: int) -> "RecurrentSeq2Seq":
        """See `RecurrentConfig.build`."""
        return RecurrentSeq2Seq(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """See `ModelConfig.source_shape`."""
        return (1,)

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        halves = {"half of model.width": ("embed", self.width // 2)} if self.bidirectional else {}
        return super().sharded_dimensions() | halves

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `RecurrentConfig.token_flops`; the source is taken to be as long as the text written."""
        e, gates, attention = self.width, self.cell.gates, self.attention
        encoder = self.depth * gates * e * e * (1.5 if self.bidirectional else 2)
        weights, pairs = 0, 0
        if isinstance(attention, AdditiveConfig):
            inner = attention.width or e
            weights, pairs = e * (2 * inner + gates * e), inner + e
        elif isinstance(attention, GeneralConfig | DotConfig):
            weights, pairs = isinstance(attention, GeneralConfig) * e * e, 2 * e
        if not isinstance(attention, NoAttention):
            weights += 2 * e * e
        added = TokenFlops(2.0 * (encoder + weights), 2.0 * pairs * length)
        return super().token_flops(vocab_size, length) + added


class RecurrentSeq2Seq(Recurrent):
    """A source and the tokens written so far in, logits of the next token out."""

    config: RecurrentSeq2SeqConfig

    def declare_layers(self):
        """Declares both halves."""
        c = self.config
        self.encoder = RecurrentStack(c.layers, c.depth, c.bidirectional, c.scan, c.remat)
        self.decoder = AlignedStack(c.layers, c.depth, c.attention, c.scan, c.remat)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> RecurrentCache:
        """What the decoder starts from, and what it is to look at.

        Args:
          source: ids of tokens.
          source_segments: 0 where it is padding; None is nowhere.
          deterministic: False drops out, with an rng named "dropout".
        """
        segment_ids = jnp.ones_like(source) if source_segments is None else source_segments
        valid, states = (segment_ids > 0)[..., None], self.init_cache(len(source), 0).layers
        x, states = self.encoder(self.embed(source), valid, jnp.zeros_like(valid), states, deterministic)
        return RecurrentCache(states, EncoderOutput(x, (segment_ids > 0).astype(jnp.int32)))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: RecurrentCache | None = None,
        deterministic: bool = True,
        source: Int[Array, "B S"] | None = None,
        source_segments: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentCache | None]:
        """The decoder's activations before the logits, and the cache with these tokens in it.

        Args:
          tokens: ids.
          segment_ids: 0 for padding, which changes no state; None is none.
          positions: not looked at, for a row is one text.
          cache: what was read before; without a source, the cache has what was made of it.
          deterministic: False drops out, with an rng named "dropout".
          source: see `encode`.
          source_segments: see `encode`.
        """
        del positions
        segments = jnp.ones_like(tokens) if segment_ids is None else (segment_ids > 0).astype(jnp.int32)
        encoded = cache if source is None else self.encode(source, source_segments, deterministic)
        if encoded is None or encoded.memory is None:
            raise InputError("an encoder-decoder needs a source, or a cache in which there is one")
        x, states = self.decoder(self.embed(tokens), segments, encoded.layers, encoded.memory, deterministic)
        x = self.drop(x, deterministic=deterministic)
        return x, None if cache is None else RecurrentCache(states, encoded.memory)
