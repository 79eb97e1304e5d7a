"""Speech encoders: sound that is read as a text is (Whisper, arXiv 2212.04356, section 2.2)."""

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError
from attnlab.layers.attention import Bidirectional, EncoderOutput, LayerSpec, NoPositions, SequenceInputs
from attnlab.layers.convolution import Convolution1d
from attnlab.layers.dropout import Dropout
from attnlab.layers.feed_forward import ACTIVATIONS
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import parameter
from attnlab.models.base import SourceConfig, TokenFlops, TransformerConfig
from attnlab.sharding import constrain


@dataclass(frozen=True)
class SpeechEncoderConfig(TransformerConfig, SourceConfig):
    """Whisper's encoder of log-mel frames, as of `attnlab.data.audio`; to write, a `Seq2SeqConfig` has one.

    Attributes:
      mels: numbers in a frame.
      frames: the most that are read; positions are of every second.
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
        """Refuses to be trained by itself: it writes nothing."""
        raise InputError("a SpeechEncoderConfig only reads: make it the encoder of a Seq2SeqConfig")

    def build(self, vocab_size: int) -> "SpeechEncoder":
        """The module of this config; it knows no tokens."""
        return SpeechEncoder(self)

    def learning_rate_multipliers(self) -> dict[str, float]:
        """See `ModelConfig.learning_rate_multipliers`: positions stay as they are."""
        return super().learning_rate_multipliers() | {"position_embedding$": 0.0}

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """See `SourceConfig.encoder_output_shape`."""
        return (length + 1) // 2, self.width

    def source_flops(self, length: int) -> TokenFlops:
        """See `SourceConfig.source_flops`."""
        positions, _ = self.encoder_output_shape(length)
        convolutions = 3.0 * self.width * (length * self.mels + positions * self.width)
        return self.layer_flops(positions) * positions + TokenFlops(2.0 * convolutions, 0.0)


class SpeechEncoder(nn.Module):
    """Frames in, a vector of every second out.

    Attributes:
      config: see `SpeechEncoderConfig`.
    """

    config: SpeechEncoderConfig

    def setup(self):
        """Declares two convolutions, the positions, the stack of blocks and the last norm."""
        c, std = self.config, self.config.init.std
        self.convolution1 = Convolution1d(
            c.mels, c.width, 3, ("window", "mlp"), std, True, c.dtypes, padding=1
        )
        self.convolution2 = Convolution1d(c.width, c.width, 3, ("mlp", "embed"), std, True, c.dtypes, 2, 1)
        self.layers = c.stack(NoPositions())
        self.norm = c.norm.build(c.dtypes)
        self.drop = Dropout(c.dropout)
        # A constant, which checkpoints have among their tensors.
        shape, start = (c.frames // 2, c.width), sinusoids(c.frames // 2, c.width)
        self.position_embedding = parameter(
            self, "position_embedding", shape, ("sequence", "embed"), c.dtypes, mean=start
        )

    def encode(
        self,
        source: Float[Array, "B S mels"],
        source_segments: Int[Array, "B S"],
        deterministic: bool = True,
    ) -> EncoderOutput:
        """The memory of a sound, which is padding where its segments are 0.

        Raises:
          InputError: more frames than there are positions for, or of another number of mels.
        """
        c = self.config
        if source.shape[1] > c.frames or source.shape[2] != c.mels:
            raise InputError(
                f"the encoder reads at most {c.frames} frames of {c.mels} mels, not {source.shape[1]} of "
                f"{source.shape[2]}"
            )
        gelu, valid = ACTIVATIONS["gelu_exact"], (source_segments > 0)[..., None]
        # Beyond the end there is nothing: a sound is read as it would be if its row ended with it.
        x = jnp.where(valid, gelu(self.convolution1(jnp.where(valid, source, 0))), 0)
        x = gelu(self.convolution2(x))
        segments = constrain(source_segments[:, ::2], "batch", "sequence")
        x = x + jax.lax.stop_gradient(self.position_embedding)[None, : x.shape[1]]
        x = self.drop(constrain(x, "batch", "sequence", None), deterministic=deterministic)
        positions = jnp.zeros_like(segments) + jnp.arange(segments.shape[1])[None]
        x, _ = self.layers(x, None, SequenceInputs(segments, positions), deterministic)
        return EncoderOutput(x if c.placement == "post" else self.norm(x), segments)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "T E"]:
    """Sines of every position, then cosines of the same angles, whose speeds fall from 1 to 1/10000."""
    speeds = 10_000.0 ** -(np.arange(width // 2) / max(width // 2 - 1, 1))
    angles = np.arange(length)[:, None] * speeds
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
