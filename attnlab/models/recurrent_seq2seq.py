"""Recurrent encoder-decoders, without attention or with Bahdanau's or Luong's."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError
from attnlab.layers.alignment import AdditiveConfig, AlignedStack, DotConfig, GeneralConfig, NoAttention
from attnlab.layers.attention import Documents, EncoderOutput, SegmentIds, documents
from attnlab.layers.recurrent import RecurrentStack
from attnlab.models.flops import TokenFlops
from attnlab.models.recurrent import Recurrent, RecurrentCache, RecurrentConfig


@dataclass(frozen=True)
class RecurrentSeq2SeqConfig(RecurrentConfig):
    """A recurrent encoder, and a decoder whose initial states are the encoder's last states.

    Both have `depth` layers and share one embedding table. The decoder can attend to the encoder's
    outputs.

    Attributes:
      attention: `NoAttention`, `AdditiveConfig`, `GeneralConfig` or `DotConfig`.
      bidirectional: whether the encoder is bidirectional, with half the width in each direction.
    """

    attention: NoAttention | AdditiveConfig | GeneralConfig | DotConfig = field(
        default_factory=AdditiveConfig
    )
    bidirectional: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.bidirectional and self.width % 2:
            raise ValueError(f"bidirectional=true needs an even width, not {self.width}")

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
        """See `RecurrentConfig.token_flops`; assumes a source as long as the target."""
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
    """A recurrent encoder-decoder: maps a source and target tokens to next-token logits."""

    config: RecurrentSeq2SeqConfig

    def declare_layers(self):
        """Declare the encoder and the decoder."""
        c = self.config
        self.encoder = RecurrentStack(c.layers, c.depth, c.bidirectional, c.scan, c.remat)
        self.decoder = AlignedStack(c.layers, c.depth, c.attention, c.scan, c.remat)

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
    ) -> RecurrentCache:
        """Return the decoder's initial states, and the encoder output that it attends to."""
        rows = documents(source_segments, source)
        valid, states = (rows.ids > 0)[..., None], self.init_cache(len(source), 0).layers
        x, states = self.encoder(self.embed(source), valid, jnp.zeros_like(valid), states, deterministic)
        return RecurrentCache(states, EncoderOutput(x, Documents((rows.ids > 0).astype(jnp.int32))))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        source: Int[Array, "B S"] | None = None,
        source_segments: SegmentIds = None,
        cache: RecurrentCache | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], RecurrentCache]:
        """Return the decoder's activations before the logits; see `Model`.

        Args:
          tokens: token ids of the target.
          segment_ids: 0 at padding, which does not change the state; None means no padding.
          positions: ignored, because each row is one document.
          source: token ids of the source.
          source_segments: 0 at padding; None means no padding.
          cache: states after the preceding tokens, and the encoder output; it is required if
            `source` is None.
          deterministic: see `Model`.

        Raises:
          InputError: neither a source nor a cache with an encoder output is given.
        """
        del positions
        segments = (documents(segment_ids, tokens).ids > 0).astype(jnp.int32)
        encoded = (
            cache if source is None else self.encode(source, source_segments, deterministic=deterministic)
        )
        if encoded is None or encoded.memory is None:
            raise InputError("an encoder-decoder needs a source, or a cache with an encoder output")
        x, states = self.decoder(self.embed(tokens), segments, encoded.layers, encoded.memory, deterministic)
        x = self.drop(x, deterministic=deterministic)
        return x if cache is None else (x, RecurrentCache(states, encoded.memory))
