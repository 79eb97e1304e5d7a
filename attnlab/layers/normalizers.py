"""Normalizers of a layer: configs that map masked scores to attention weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float

from attnlab.attention import normalizers
from attnlab.attention.normalizers import Weights


class LayerNormalizer(ABC):
    """Normalizer of a layer. For a new one, derive a frozen dataclass in an experiment's file.

    Attributes:
      softmax_sink: score of the sink if this is the softmax with a sink, which all backends
        support. `reference` alone supports the others: it holds all scores in memory.
    """

    softmax_sink: ClassVar[float | None] = None

    @abstractmethod
    def __call__(self, scores: Float[Array, "*b S"]) -> Weights:
        """Return the weights over the last axis, and a value per row like the log-sum-exp.

        Masked scores are -inf. A row of only -inf must get weights and gradients 0.
        """


@dataclass(frozen=True)
class SoftmaxOne(LayerNormalizer):
    """exp(s_i) / (1 + sum_j exp(s_j)) (Miller 2023, "Attention Is Off By One")."""

    softmax_sink: ClassVar[float | None] = 0.0

    def __call__(self, scores):
        """See `LayerNormalizer.__call__`."""
        return normalizers.off_by_one(scores)


@dataclass(frozen=True)
class Sigmoid(LayerNormalizer):
    """sigmoid(s_i - log(length)), for sequences of about this length (arXiv 2409.04431)."""

    length: int = 256

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")

    def __call__(self, scores):
        """See `LayerNormalizer.__call__`."""
        return normalizers.sigmoid(self.length)(scores)


@dataclass(frozen=True)
class TopK(LayerNormalizer):
    """Softmax of the k highest scores of each query (arXiv 1912.11637)."""

    k: int = 32

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")

    def __call__(self, scores):
        """See `LayerNormalizer.__call__`."""
        return normalizers.top_k(self.k)(scores)


@dataclass(frozen=True)
class Sparsemax(LayerNormalizer):
    """Euclidean projection of the scores onto the simplex (arXiv 1602.02068)."""

    def __call__(self, scores):
        """See `LayerNormalizer.__call__`."""
        return normalizers.sparsemax(scores)


@dataclass(frozen=True)
class Entmax(LayerNormalizer):
    """1.5-entmax, between softmax and sparsemax (arXiv 1905.05702)."""

    def __call__(self, scores):
        """See `LayerNormalizer.__call__`."""
        return normalizers.entmax15(scores)
