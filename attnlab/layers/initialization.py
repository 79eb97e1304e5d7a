"""How large weights start, and what must change with the width."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Normal:
    """One deviation for all weights, sqrt(2 L) smaller for the last map of a branch (GPT-2, section 2.3)."""

    std: float = 0.02

    def hidden_std(self, width: int) -> float:
        """Deviation of the weights inside blocks."""
        del width
        return self.std

    def readout_scale(self, width: int) -> float:
        """Factor of the activations before the logits."""
        del width
        return 1.0

    def attention_scale(self, head_dim: int) -> float | None:
        """Factor of the attention scores; None is 1 / sqrt(D)."""
        del head_dim
        return None

    def learning_rate(self, width: int) -> float:
        """Factor of the learning rate of the weights inside blocks."""
        del width
        return 1.0


@dataclass(frozen=True)
class MuP(Normal):
    """Maximal-update parametrisation for Adam: the best learning rate of a model of `base_width` and
    `base_head_dim` holds at any width (Yang et al. 2022, arXiv 2203.03466, table 8).
    """

    base_width: int = 128
    base_head_dim: int = 32

    def hidden_std(self, width: int) -> float:
        """Deviation of the weights inside blocks: 1 / sqrt(width)."""
        return self.std * (self.base_width / width) ** 0.5

    def readout_scale(self, width: int) -> float:
        """Factor of the activations before the logits: 1 / width."""
        return self.base_width / width

    def attention_scale(self, head_dim: int) -> float:
        """Factor of the attention scores: 1 / D, equal to 1 / sqrt(D) at the base."""
        return self.base_head_dim**0.5 / head_dim

    def learning_rate(self, width: int) -> float:
        """Factor of the learning rate of the weights inside blocks: 1 / width."""
        return self.base_width / width
