"""Image captioning with a decoder that cross-attends to image patches.

arXiv 1502.03044; Flamingo, arXiv 2204.14198.
"""

from dataclasses import dataclass, field, replace

from jaxtyping import Array

from attnlab.layers.attention import EncoderOutput, SegmentIds
from attnlab.layers.blocks import CrossAttentionConfig, GatedCrossAttentionConfig
from attnlab.layers.linear import Linear
from attnlab.layers.specs import NoPositions
from attnlab.models.flops import TokenFlops, feed_forward_weights
from attnlab.models.resampler import Resampler, ResamplerConfig
from attnlab.models.seq2seq import Seq2Seq, Seq2SeqConfig
from attnlab.models.vit import ViTConfig


@dataclass(frozen=True)
class CaptionerConfig(Seq2SeqConfig):
    """An image encoder and a text decoder that cross-attends to its output; see `Seq2SeqConfig`.

    Attributes:
      encoder: encoder of images.
      resampler: Perceiver resampler between encoder and decoder; None disables it.
      projection: whether to project the encoder output to the decoder's width.
      cross: kind of cross-attention: `CrossAttentionConfig` or `GatedCrossAttentionConfig`.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    resampler: ResamplerConfig | None = None
    projection: bool = False
    cross: CrossAttentionConfig | GatedCrossAttentionConfig = field(default_factory=CrossAttentionConfig)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.cross, GatedCrossAttentionConfig) and self.decoder.placement == "post":
            raise ValueError(
                "cross=GatedCrossAttention needs a decoder.placement without a norm in the residual stream: "
                "pre, both or branch, not post"
            )

    def build(self, vocab_size: int) -> "Captioner":
        """See `ModelConfig.build`."""
        return Captioner(self, vocab_size)

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """Return the length and the width of the sequence that the decoder cross-attends to."""
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
            2.0 * feed_forward_weights(d.feed_forward, d.width) * d.num_cross_attention_layers
            if isinstance(self.cross, GatedCrossAttentionConfig)
            else 0.0
        )
        return super().token_flops(vocab_size, length) + image * (1 / length) + TokenFlops(gated, 0.0)

    def _resampler_flops(self, resampler: ResamplerConfig, patches: int) -> TokenFlops:
        """Return the FLOPs of resampling one image."""
        e, latents = self.encoder, resampler.latents
        num_keys = patches + latents
        weights = 2 * e.width * e.head_dim * (latents * e.attention.heads + num_keys * e.kv_heads)
        weights += latents * feed_forward_weights(e.feed_forward, e.width)
        pairs = 4.0 * e.attention.heads * e.head_dim * latents * num_keys
        return TokenFlops(2.0 * weights, pairs) * resampler.depth


class Captioner(Seq2Seq):
    """A captioning model: maps an image and text tokens to next-token logits; see `Seq2Seq`."""

    config: CaptionerConfig

    def setup(self):
        """Declare the encoder, the resampler, the projection and the decoder."""
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
        self, source: Array, source_segments: SegmentIds = None, *, deterministic: bool = True
    ) -> EncoderOutput:
        """Return the sequence that the decoder cross-attends to; see `Seq2Seq.encode`."""
        memory = super().encode(source, source_segments, deterministic=deterministic)
        if self.is_initializing():
            # Declare the pooling parameters: encoder checkpoints contain them, although they are
            # unused.
            self.encoder.pooled(memory)
        if self.config.resampler is not None:
            memory = self.resampler(memory, deterministic)
        if self.config.projection:
            memory = replace(memory, hidden=self.projection(memory.hidden))
        return memory
