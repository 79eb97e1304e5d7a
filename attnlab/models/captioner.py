"""Captioners: what a picture shows, written by a decoder that looks at it (arXiv 1502.03044, 2204.14198)."""

from dataclasses import dataclass, field, replace

from jaxtyping import Array, Int

from attnlab.layers.attention import EncoderOutput, NoPositions
from attnlab.layers.blocks import CrossAttentionConfig, GatedCrossAttentionConfig
from attnlab.layers.linear import Linear
from attnlab.layers.resampler import Resampler, ResamplerConfig
from attnlab.models.base import TokenFlops
from attnlab.models.seq2seq import Seq2Seq, Seq2SeqConfig
from attnlab.models.vit import ViTConfig


@dataclass(frozen=True)
class CaptionerConfig(Seq2SeqConfig):
    """An encoder of images, and a decoder of text that looks at what it made of them; see `Seq2SeqConfig`.

    Attributes:
      resampler: makes a few latents of an image's patches before the text looks; None is no such thing.
      projection: whether a linear map makes what is looked at as wide as the decoder.
      cross: how the decoder's layers attend to the image: `CrossAttentionConfig` or
        `GatedCrossAttentionConfig`.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    resampler: ResamplerConfig | None = None
    projection: bool = False
    cross: CrossAttentionConfig | GatedCrossAttentionConfig = field(default_factory=CrossAttentionConfig)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.cross, GatedCrossAttentionConfig) and self.decoder.placement == "post":
            raise ValueError(
                "cross=GatedCrossAttention needs a decoder.placement whose residual stream has no norm in it"
            )

    def build(self, vocab_size: int) -> "Captioner":
        """See `ModelConfig.build`."""
        return Captioner(self, vocab_size)

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """Length and width of what is looked at."""
        slots, width = super().encoder_output_shape(length)
        slots = slots if self.resampler is None else self.resampler.latents
        return slots, self.decoder.width if self.projection else width

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`."""
        e, d, image = self.encoder, self.decoder, TokenFlops(0.0, 0.0)
        patches, width = e.encoder_output_shape(self.source_shape[0])
        slots, _ = self.encoder_output_shape(self.source_shape[0])
        if self.resampler is not None:
            image += self._resampler_flops(self.resampler, patches)
        if self.projection:
            image += TokenFlops(2.0 * slots * width * d.width, 0.0)
        gated = (
            2.0 * d.feed_forward_weights() * d.num_cross_attention_layers
            if isinstance(self.cross, GatedCrossAttentionConfig)
            else 0.0
        )
        return super().token_flops(vocab_size, length) + image * (1 / length) + TokenFlops(gated, 0.0)

    def _resampler_flops(self, resampler: ResamplerConfig, patches: int) -> TokenFlops:
        """Operations for the latents of an image."""
        e, latents = self.encoder, resampler.latents
        seen = patches + latents
        weights = 2 * e.width * e.head_dim * (latents * e.attention.heads + seen * e.kv_heads)
        weights += latents * e.feed_forward_weights()
        pairs = 4.0 * e.attention.heads * e.head_dim * latents * seen
        return TokenFlops(2.0 * weights, pairs) * resampler.depth


class Captioner(Seq2Seq):
    """An image and the tokens written so far in, logits of the next token out; see `Seq2Seq`."""

    config: CaptionerConfig

    def setup(self):
        """Declares the encoder, what comes after it, and the decoder."""
        c, encoder = self.config, self.config.encoder
        self.encoder = encoder.build(self.vocab_size)
        self.decoder = c.decoder.build(self.vocab_size, c.cross)
        if c.resampler is not None:
            block = encoder.block(NoPositions())
            self.resampler = Resampler(c.resampler, block, encoder.scan, encoder.remat)
        if c.projection:
            sizes = (encoder.width,), (c.decoder.width,)
            std = c.decoder.init.hidden_std(encoder.width)
            self.projection = Linear(*sizes, ("norm", "embed"), std, True, c.decoder.dtypes)

    def encode(
        self, source: Array, source_segments: Int[Array, "B S"] | None = None, deterministic: bool = True
    ) -> EncoderOutput:
        """What the decoder is to look at; see `Seq2Seq.encode`."""
        memory = super().encode(source, source_segments, deterministic)
        if self.is_initializing():
            self.encoder.pooled(memory)  # a checkpoint's encoder has what pools, though no one reads it
        if self.config.resampler is not None:
            memory = self.resampler(memory, deterministic)
        if self.config.projection:
            memory = replace(memory, hidden=self.projection(memory.hidden))
        return memory
