"""Encoders of text: every token sees all others, and masked ones are predicted (BERT, arXiv 1810.04805)."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from attnlab.layers.attention import Bidirectional, Kind
from attnlab.layers.readout import TokenStatistics, logits, token_statistics
from attnlab.models.text import TextConfig, TextModel


@dataclass(frozen=True)
class EncoderConfig(TextConfig):
    """An encoder; fields as of `TextConfig`."""

    pattern: tuple[Kind, ...] = (Bidirectional(),)

    def build(self, vocab_size: int) -> "Encoder":
        """The module of this config for a tokenizer's vocabulary; raises as `sized` does."""
        return Encoder(self, self.sized(vocab_size).vocab_size or vocab_size)


class Encoder(TextModel):
    """Tokens in, a vector of each out, and logits of what a masked one was."""

    config: EncoderConfig

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T E"]:
        """Activations after the last layer; see `TextModel.read`."""
        return self.read(tokens, segment_ids, positions, None, deterministic)[0]

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
