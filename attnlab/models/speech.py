"""Speech encoder over log-mel spectrograms (Whisper, arXiv 2212.04356, section 2.2)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.errors import InputError
from attnlab.layers.attention import EncoderOutput, SegmentIds, SequenceInputs, documents
from attnlab.layers.convolution import Convolution1d
from attnlab.layers.linear import Dropout, parameter
from attnlab.layers.position_wise import ACTIVATIONS, LayerNormConfig, RMSNormConfig
from attnlab.layers.specs import Bidirectional, LayerSpec
from attnlab.models.config import Model, SourceConfig, TransformerConfig
from attnlab.models.decoder import layer_stack
from attnlab.models.flops import TokenFlops
from attnlab.sharding import constrain


@dataclass(frozen=True)
class SpeechEncoderConfig(TransformerConfig, SourceConfig):
    """Whisper's encoder of log-mel frames; use it as the encoder of a `Seq2SeqConfig`.

    `attnlab.data.audio` computes the frames.

    Attributes:
      mels: number of mel bins per frame.
      frames: maximum number of frames; there is one position per two frames.
    """

    mels: int = 80
    frames: int = 3000
    norm: RMSNormConfig | LayerNormConfig = field(default_factory=LayerNormConfig)
    pattern: tuple[LayerSpec, ...] = (Bidirectional(),)

    def __post_init__(self):
        super().__post_init__()
        if self.mels < 1 or self.frames < 2 or self.frames % 2 or self.width % 2:
            raise ValueError("mels must be at least 1, and frames and width even and at least 2")

    @property
    def source_shape(self) -> tuple[int, ...]:
        """See `ModelConfig.source_shape`."""
        return self.frames, self.mels

    def check_length(self, length: int) -> None:
        """Raise an error: the encoder has no output tokens and cannot be trained alone.

        Raises:
          InputError: always.
        """
        raise InputError("a SpeechEncoder has no logits to train: make it the encoder of a Seq2Seq")

    def build(self, vocab_size: int) -> "SpeechEncoder":
        """Return the module of this config; `vocab_size` is ignored."""
        return SpeechEncoder(self)

    def learning_rate_multipliers(self) -> dict[str, float]:
        """See `ModelConfig.learning_rate_multipliers`; the position table is not trained."""
        return super().learning_rate_multipliers() | {"position_embedding$": 0.0}

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """See `SourceConfig.encoder_output_shape`."""
        return (length + 1) // 2, self.width

    def source_flops(self, length: int) -> TokenFlops:
        """See `SourceConfig.source_flops`."""
        positions, _ = self.encoder_output_shape(length)
        convolutions = 3.0 * self.width * (length * self.mels + positions * self.width)
        return self.layer_flops(positions) * positions + TokenFlops(2.0 * convolutions, 0.0)


class SpeechEncoder(Model):
    """A speech encoder with one output vector per two frames.

    Attributes:
      config: see `SpeechEncoderConfig`.
    """

    config: SpeechEncoderConfig

    def setup(self):
        """Declare two convolutions, the position table, the stack of blocks and the final norm."""
        c, std = self.config, self.config.init.std
        self.convolution1 = Convolution1d(
            c.mels, c.width, 3, ("window", "mlp"), std, True, c.dtypes, padding=1
        )
        self.convolution2 = Convolution1d(c.width, c.width, 3, ("mlp", "embed"), std, True, c.dtypes, 2, 1)
        self.layers = layer_stack(c)
        self.norm = c.norm.build(c.dtypes)
        self.drop = Dropout(c.dropout)
        # A constant, but a parameter, because Whisper's checkpoints contain it.
        shape, start = (c.frames // 2, c.width), sinusoids(c.frames // 2, c.width)
        self.position_embedding = parameter(
            self, "position_embedding", shape, ("sequence", "embed"), c.dtypes, mean=start
        )

    def encode(
        self,
        source: Float[Array, "B S mels"],
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """Return the encoder output of log-mel frames; `source_segments` is 0 at padding.

        Raises:
          InputError: there are more frames than positions, or the number of mel bins differs.
        """
        c = self.config
        if source.shape[1] > c.frames or source.shape[2] != c.mels:
            raise InputError(
                f"the encoder accepts at most {c.frames} frames of {c.mels} mels, not {source.shape[1]} of "
                f"{source.shape[2]}"
            )
        frames = documents(source_segments, source[..., 0])
        gelu, valid = ACTIVATIONS["gelu_exact"], (frames.ids > 0)[..., None]
        # Zero the padding before and between the convolutions, so that it does not affect the
        # output.
        x = jnp.where(valid, gelu(self.convolution1(jnp.where(valid, source, 0))), 0)
        x = gelu(self.convolution2(x))
        rows = frames.every(2)
        x = x + jax.lax.stop_gradient(self.position_embedding)[None, : x.shape[1]]
        x = self.drop(constrain(x, "batch", "residual", None), deterministic=deterministic)
        positions = jnp.zeros_like(rows.ids) + jnp.arange(rows.ids.shape[1])[None]
        x, _ = self.layers(x, None, SequenceInputs(rows, positions), deterministic)
        return EncoderOutput(x if c.placement == "post" else self.norm(x), rows)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "T E"]:
    """Return Whisper's position table: sines, then cosines, of frequencies from 1 to 1/10000."""
    frequencies = 10_000.0 ** -(np.arange(width // 2) / max(width // 2 - 1, 1))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
