"""Transformer encoder-decoders (Vaswani et al. 2017)."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import DecoderCache
from attnlab.layers.attention import EncoderOutput, SegmentIds
from attnlab.layers.blocks import CrossAttentionConfig
from attnlab.models.config import Model, ModelConfig, SourceConfig
from attnlab.models.decoder import DecoderConfig, TextConfig
from attnlab.models.encoder import EncoderConfig
from attnlab.models.flops import TokenFlops
from attnlab.models.generation_defaults import GenerationDefaults


@dataclass(frozen=True)
class Seq2SeqConfig(ModelConfig):
    """An encoder, and a decoder that cross-attends to the encoder output in every layer.

    Attributes:
      encoder: encoder of text, images or audio.
      decoder: decoder of text.
      shared_embedding: whether a text encoder uses the decoder's embedding table.
      generation: forced, suppressed and end tokens of generation.
    """

    encoder: SourceConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    shared_embedding: bool = False
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self):
        if self.decoder.generation != GenerationDefaults():
            raise ValueError("set generation of the whole model, not decoder.generation")
        widths = [part.table_width for part in (self.encoder, self.decoder) if isinstance(part, TextConfig)]
        if self.shared_embedding and (len(widths) < 2 or widths[0] != widths[1]):
            raise ValueError(
                "shared_embedding needs a text encoder whose tables are as wide as the decoder's"
            )

    def build(self, vocab_size: int) -> "Seq2Seq":
        """See `ModelConfig.build`."""
        return Seq2Seq(self, vocab_size)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """See `ModelConfig.source_shape`."""
        return self.encoder.encoder_input_shape

    @property
    def causal(self) -> bool:
        """See `ModelConfig.causal`."""
        return self.decoder.causal

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return self.encoder.uses_dropout or self.decoder.uses_dropout

    def check_length(self, length: int) -> None:
        """See `ModelConfig.check_length`."""
        self.decoder.check_length(length)

    def check_source_length(self, length: int) -> None:
        """See `ModelConfig.check_source_length`."""
        if isinstance(self.encoder, TextConfig):
            self.encoder.check_length(length)

    def with_vocab_size(self, vocab_size: int) -> Self:
        """See `ModelConfig.with_vocab_size`."""
        return replace(
            self,
            encoder=self.encoder.with_vocab_size(vocab_size),
            decoder=self.decoder.with_vocab_size(vocab_size),
        )

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """Return the length and the width of the sequence that the decoder cross-attends to."""
        return self.encoder.encoder_output_shape(length)

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`; assumes that a text source is as long as the target."""
        d, (size, *rest) = self.decoder, self.source_shape
        source = size if rest else length
        slots, width = self.encoder_output_shape(source)
        # Query and output projections of each token; key and value projections of the encoder
        # output.
        per_row = length * 2 * d.width * d.attention.heads + slots * 2 * width * d.kv_heads
        cross = TokenFlops(
            2.0 * d.num_cross_attention_layers * d.head_dim * per_row / length,
            4.0 * d.num_cross_attention_layers * d.head_dim * d.attention.heads * slots,
        )
        encoding = self.encoder.source_flops(source) * (1 / length)
        return d.token_flops(vocab_size, length) + cross + encoding


class Seq2Seq(Model):
    """An encoder-decoder: maps a source and target tokens to next-token logits.

    Attributes:
      config: see `Seq2SeqConfig`.
      vocab_size: number of tokens of the tokenizer.
    """

    config: Seq2SeqConfig
    vocab_size: int

    def setup(self):
        """Declare the encoder and the decoder."""
        self.encoder = self.config.encoder.build(self.vocab_size)
        self.decoder = self.config.decoder.build(self.vocab_size, CrossAttentionConfig())

    def encode(
        self,
        source: Array,
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """Return the encoder output that the decoder cross-attends to; see `Model`."""
        table = {"table": self.decoder.embedding()} if self.config.shared_embedding else {}
        return self.encoder.encode(source, source_segments, deterministic=deterministic, **table)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        source: Array | None = None,
        source_segments: SegmentIds = None,
        cache: DecoderCache | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], DecoderCache]:
        """Return the decoder's activations before the logits; see `Model`."""
        options: dict[str, Any] = {"cache": cache, "deterministic": deterministic}
        if source is not None:
            options["memory"] = self.encode(source, source_segments, deterministic=deterministic)
        return self.decoder.hidden(tokens, segment_ids, positions, **options)

    def readout_weights(self):
        """See `Model.readout_weights`."""
        return self.decoder.readout_weights()

    def init_cache(self, batch: int, slots: int) -> DecoderCache:
        """See `DecoderConfig.empty_cache`."""
        return self.config.decoder.empty_cache(batch, slots, cross=True)
