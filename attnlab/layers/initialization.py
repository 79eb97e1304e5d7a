"""Initialisation, and the scale factors that depend on the model width."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Normal:
    """Normal initialisation with one standard deviation for all weights.

    The last map of each residual branch is initialised sqrt(2 L) smaller (GPT-2, section 2.3).
    """

    std: float = 0.02

    def hidden_std(self, width: int) -> float:
        """Return the standard deviation of weights inside blocks."""
        del width
        return self.std

    def readout_scale(self, width: int) -> float:
        """Return the factor of the activations before the logits."""
        del width
        return 1.0

    def attention_scale(self, head_dim: int) -> float | None:
        """Return the factor of the attention scores; None means 1 / sqrt(D)."""
        del head_dim
        return None

    def learning_rate(self, width: int) -> float:
        """Return the learning-rate multiplier of weights inside blocks."""
        del width
        return 1.0


@dataclass(frozen=True)
class MuP(Normal):
    """Maximal-update parametrisation (muP) for Adam (Yang et al. 2022, arXiv 2203.03466, table 8).

    The learning rate tuned for a model of `base_width` and `base_head_dim` transfers to any width.
    """

    base_width: int = 128
    base_head_dim: int = 32

    def hidden_std(self, width: int) -> float:
        """Return the standard deviation of weights inside blocks, ~ 1 / sqrt(width)."""
        return self.std * (self.base_width / width) ** 0.5

    def readout_scale(self, width: int) -> float:
        """Return the factor of the activations before the logits, ~ 1 / width."""
        return self.base_width / width

    def attention_scale(self, head_dim: int) -> float:
        """Return the factor of the scores, ~ 1 / D, which equals 1 / sqrt(D) at the base."""
        return self.base_head_dim**0.5 / head_dim

    def learning_rate(self, width: int) -> float:
        """Return the learning-rate multiplier of weights inside blocks, ~ 1 / width."""
        return self.base_width / width
