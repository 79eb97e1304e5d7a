"""Vision-language models: a decoder over projected image patches and text tokens.

LLaVA, arXiv 2304.08485; PaliGemma, arXiv 2407.07726.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import DecoderCache
from attnlab.errors import check_fields
from attnlab.layers.attention import EncoderOutput, SegmentIds, documents
from attnlab.layers.linear import Linear
from attnlab.layers.position_wise import ACTIVATIONS
from attnlab.models.flops import TokenFlops
from attnlab.models.seq2seq import Seq2Seq, Seq2SeqConfig
from attnlab.models.vit import ViTConfig
from attnlab.sharding import constrain, gather_length


@dataclass(frozen=True)
class ProjectorConfig:
    """Projection of image patches to the decoder's width.

    Attributes:
      activation: None means one linear map x W; otherwise the activation of activation(x W1) W2
        (LLaVA-1.5, arXiv 2310.03744).
      bias: whether the linear maps have biases.
    """

    activation: Literal["gelu", "gelu_exact", "relu", "silu"] | None = None
    bias: bool = True


@dataclass(frozen=True)
class VisionLanguageConfig(Seq2SeqConfig):
    """An image encoder, and a decoder over image patches and text tokens; see `Seq2SeqConfig`.

    Attributes:
      encoder: encoder of images.
      projector: projection of patches to the decoder's width.
      encoder_final_norm: whether patches are taken after the encoder's final norm.
      image_token_id: id of the placeholder tokens that patches replace, one patch each; None
        prepends the patches to the text.
      prompt_suffix: text appended to the prompt in models whose images precede the text; None if
        the prompt contains image tokens.
      bidirectional_prompt: whether image tokens, and with a cache also prompt tokens, attend to
        each other in both directions (prefix LM).
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    encoder_final_norm: bool = True
    image_token_id: int | None = None
    prompt_suffix: str | None = None
    bidirectional_prompt: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "image_token_id", least=0)

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of an image."""
        return self.encoder.encoder_output_shape(self.source_shape[0])[0] - self.encoder.num_prefix_tokens

    @property
    def text_offset(self) -> int:
        """Number of image tokens before the text; 0 if they are within the text."""
        return self.num_image_tokens if self.image_token_id is None else 0

    def build(self, vocab_size: int) -> "VisionLanguageModel":
        """See `ModelConfig.build`."""
        return VisionLanguageModel(self, vocab_size)

    def check_length(self, length: int) -> None:
        """See `ModelConfig.check_length`."""
        self.decoder.check_length(self.text_offset + length)

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`."""
        e, d, tokens = self.encoder, self.decoder, self.text_offset + length
        maps = e.width * d.width + (d.width**2 if self.projector.activation else 0)
        image = e.source_flops(self.source_shape[0]) + TokenFlops(2.0 * self.num_image_tokens * maps, 0.0)
        readout = TokenFlops(2.0 * vocab_size * d.width, 0.0)
        return (image + d.layer_flops(tokens) * tokens) * (1 / length) + readout


class VisionLanguageModel(Seq2Seq):
    """A vision-language model: maps an image and text tokens to next-token logits.

    Attributes:
      config: see `VisionLanguageConfig`.
      vocab_size: number of tokens of the tokenizer.
    """

    config: VisionLanguageConfig

    def setup(self):
        """Declare the encoder, the projector and the decoder."""
        c = self.config
        self.encoder = c.encoder.build(self.vocab_size)
        self.decoder = c.decoder.build(self.vocab_size)
        deep = c.projector.activation is not None
        axes = ("embed", "mlp") if deep else ("norm", "embed")
        self.projection = self._linear(c.encoder.width, *axes)
        if deep:
            self.projection_out = self._linear(c.decoder.width, "mlp", "embed")

    def _linear(self, inputs: int, *axes: str) -> Linear:
        c, d = self.config, self.config.decoder
        return Linear((inputs,), (d.width,), axes, d.init.hidden_std(inputs), c.projector.bias, d.dtypes)

    def encode(
        self, source: Array, source_segments: SegmentIds = None, *, deterministic: bool = True
    ) -> EncoderOutput:
        """Return the image tokens of the decoder; see `Seq2Seq.encode` for the arguments."""
        c, first = self.config, self.config.encoder.num_prefix_tokens
        encoded = self.encoder.encode(
            source, source_segments, deterministic=deterministic, final_norm=c.encoder_final_norm
        )
        x = self.projection(encoded.hidden[:, first:])
        if c.projector.activation:
            x = self.projection_out(ACTIVATIONS[c.projector.activation](x))
        return EncoderOutput(x, encoded.documents.after(first))

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
        prompt: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], DecoderCache]:
        """Return the activations of the text tokens before the logits; see `Model`.

        Args:
          tokens: token ids, with `config.image_token_id` at the positions of patches.
          segment_ids: see `Model`.
          positions: position of each text token, not counting image tokens before the text.
          source: images, (B, height, width, channels).
          source_segments: 0 at padding rows of pixels; None means no padding.
          cache: KV cache of the preceding tokens; it must include the image if `source` is None.
          deterministic: see `Model`.
          prompt: 1 at tokens that attend to each other in both directions, if
            `config.bidirectional_prompt`; None means the image tokens, and with a cache all
            `tokens`.
        """
        c, n = self.config, self.config.text_offset
        if positions is not None:
            positions = positions + n
        if source is None:
            return self.decoder.hidden(
                tokens, segment_ids, positions, cache=cache, deterministic=deterministic
            )
        image = self.encode(source, source_segments, deterministic=deterministic)
        image = replace(image, hidden=gather_length(image.hidden))
        rows = documents(segment_ids, tokens)
        if positions is None:
            positions = n + jnp.maximum(jnp.cumsum(rows.ids > 0, axis=1, dtype=jnp.int32) - 1, 0)
        tokens, positions = (constrain(a, "batch", None) for a in (tokens, positions))
        if c.image_token_id is None:
            is_image = jnp.zeros_like(tokens, bool)
            x = self.decoder.embed(tokens, positions, deterministic=deterministic)
        else:
            is_image = tokens == c.image_token_id
            text = jnp.where(is_image, 0, tokens)
            x = gather_length(self.decoder.embed(text, positions, deterministic=deterministic))
            image_index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image.hidden.shape[1] - 1)
            placed = jax.vmap(lambda rows, i: rows[i])(image.hidden, image_index)
            x = jnp.where(is_image[..., None], constrain(placed, "batch", None, None), x)
        x = gather_length(x)
        if prompt is None:
            prompt = (rows.ids > 0) if cache is not None else is_image
        prompt = constrain(prompt.astype(jnp.int32), "batch", None)
        if n:
            places = jnp.zeros_like(image.segments) + jnp.arange(n)[None]
            rows = image.documents.followed_by(rows)
            x = jnp.concatenate([image.hidden, x], axis=1)
            positions = jnp.concatenate([places, positions], axis=1)
            prompt = jnp.concatenate([image.segments, prompt], axis=1)
            tokens = jnp.concatenate([jnp.zeros_like(image.segments), tokens], axis=1)
        ids = prompt if c.bidirectional_prompt else None
        options = {"deterministic": deterministic, "embedded": x, "bidirectional_ids": ids}
        x = self.decoder.hidden(tokens, rows.segment_ids, positions, cache=cache, **options)
        x, *new_cache = (x,) if cache is None else x
        x = gather_length(x)[:, n:]
        return (x, *new_cache) if new_cache else x

    def init_cache(self, batch: int, slots: int) -> DecoderCache:
        """See `DecoderConfig.empty_cache`; adds slots for image tokens before the text."""
        return self.config.decoder.empty_cache(batch, slots + self.config.text_offset)
