"""Encoders of text: every token sees all others, and masked ones are predicted (BERT, arXiv 1810.04805)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.layers.attention import Bidirectional, Kind, Memory
from attnlab.layers.readout import TokenStatistics, logits, token_statistics
from attnlab.models.base import SourceConfig, TokenFlops
from attnlab.models.text import TextConfig, TextModel


@dataclass(frozen=True)
class EncoderConfig(TextConfig, SourceConfig):
    """An encoder; fields as of `TextConfig`."""

    pattern: tuple[Kind, ...] = (Bidirectional(),)

    def build(self, vocab_size: int) -> "Encoder":
        """The module of this config for a tokenizer's vocabulary; raises as `sized` does."""
        return Encoder(self, self.sized(vocab_size).vocab_size or vocab_size)

    def memory_shape(self, length: int) -> tuple[int, int]:
        """See `SourceConfig.memory_shape`."""
        return length, self.width

    def source_flops(self, length: int) -> TokenFlops:
        """See `SourceConfig.source_flops`."""
        return self.layer_flops(length) * length


class Encoder(TextModel):
    """Tokens in, a vector of each out, and logits of what a masked one was."""

    config: EncoderConfig

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        table: Float[Array, "V E"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Activations after the last layer; see `TextModel.read`."""
        return self.read(tokens, segment_ids, positions, None, deterministic, table=table)[0]

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: Int[Array, "B S"],
        deterministic: bool = True,
        table: Float[Array, "V E"] | None = None,
    ) -> Memory:
        """The memory of a text, which is padding where its segments are 0."""
        positions = jnp.maximum(jnp.cumsum(source_segments, axis=1) - 1, 0)
        x = self.hidden(source, source_segments, positions, deterministic, table)
        return Memory(x, source_segments)

    def __call__(self, tokens, segment_ids=None, positions=None, deterministic=True) -> Float[Array, "B T V"]:
        """Logits of each token. Arguments as of `hidden`."""
        return logits(self.hidden(tokens, segment_ids, positions, deterministic), *self._readout())

    def statistics(
        self, tokens, targets, segment_ids=None, positions=None, deterministic=True
    ) -> TokenStatistics:
        """What a loss needs of each token's logits."""
        x = self.hidden(tokens, segment_ids, positions, deterministic)
        return token_statistics(x, targets, *self._readout())

    def _readout(self):
        return self.embedding(), None, None, self.config.dtypes.logits
