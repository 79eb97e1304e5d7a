"""Forward FLOPs per token (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from attnlab.layers.experts import ExpertsConfig
from attnlab.layers.position_wise import GatedMLPConfig, MLPConfig
from attnlab.layers.scores import LayerSizes
from attnlab.layers.specs import LayerSpec


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs per token; a multiply-add counts as two.

    Attributes:
      weights: FLOPs of products with parameters.
      attention: FLOPs of attention scores and weighted sums.
    """

    weights: float
    attention: float

    @property
    def training(self) -> float:
        """FLOPs of the forward and the backward pass; the backward pass costs twice the forward."""
        return 3 * (self.weights + self.attention)

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, factor: float) -> "TokenFlops":
        return TokenFlops(self.weights * factor, self.attention * factor)


def attention_flops(
    specs: Sequence[LayerSpec], width: int, heads: int, kv_heads: int, head_dim: int, length: int
) -> TokenFlops:
    """Return the FLOPs of self-attention layers; counts only the pairs that their masks allow.

    A layer counts the matrix products of its mixer and its scores; see `Mixer.products`.

    Args:
      specs: spec of each layer.
      width: model width E.
      heads: number of query heads H.
      kv_heads: number of key/value heads K.
      head_dim: width D of a head.
      length: number of tokens of a row.
    """
    sizes = LayerSizes(width, heads, kv_heads, head_dim)
    total = TokenFlops(0.0, 0.0)
    for spec, count in Counter(specs).items():  # evaluate each distinct mask once
        token, pair = spec.products(sizes)
        keys = length * spec.mask().density(length, length)  # average number of keys per query
        total += TokenFlops(2.0 * token, 2.0 * pair * keys) * count
    return total


def feed_forward_weights(config: MLPConfig | GatedMLPConfig | ExpertsConfig, width: int) -> int:
    """Return the number of weights of a feed-forward layer that one token is multiplied with.

    It counts only the experts that a token uses.
    """
    matrix = width * config.hidden(width)
    if isinstance(config, ExpertsConfig):
        return config.experts * width + 3 * config.top_k * matrix
    return (3 if isinstance(config, GatedMLPConfig) else 2) * matrix


def inactive_expert_params(config: MLPConfig | GatedMLPConfig | ExpertsConfig, width: int) -> int:
    """Return the number of expert parameters of a layer that one token does not use."""
    if not isinstance(config, ExpertsConfig):
        return 0
    hidden = config.hidden(width)
    biases = 2 * hidden + width if config.bias else 0
    return (config.experts - config.top_k) * (3 * width * hidden + biases)
