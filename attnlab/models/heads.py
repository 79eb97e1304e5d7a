"""Heads of encoders: what is made of the activations of a text's tokens."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.layers.dropout import Dropout
from attnlab.layers.feed_forward import ACTIVATIONS
from attnlab.layers.initialization import Normal
from attnlab.layers.linear import Bias, Embedding, Linear
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import Dtypes
from attnlab.sharding import out_sharding


@dataclass(frozen=True)
class DenseConfig:
    """A map in front of a head's own: activation(x W + b), then the model's norm if asked."""

    activation: Literal["tanh", "gelu", "gelu_exact", "relu", "silu"] = "tanh"
    bias: bool = True
    norm: bool = False


@dataclass(frozen=True)
class FirstToken:
    """A document's first token stands for it: BERT's class token (arXiv 1810.04805, section 3)."""

    def pooling_mask(self, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """The tokens to take the mean of."""
        return segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))


@dataclass(frozen=True)
class MeanOfTokens:
    """The mean of a document's tokens stands for it (Sentence-BERT, arXiv 1908.10084, section 3)."""

    def pooling_mask(self, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """The tokens to take the mean of."""
        return segments > 0


def pool(
    x: Float[Array, "B T E"], segments: Int[Array, "B T"], pooling: FirstToken | MeanOfTokens
) -> Float[Array, "B T E"]:
    """The vector of each token's document, padding left out; 0 at padding."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    # In float32, for half precision cannot count.
    among = (same & pooling.pooling_mask(segments)[:, None, :]).astype(jnp.float32)
    weights = (among / jnp.maximum(among.sum(-1, keepdims=True), 1)).astype(x.dtype)
    return jnp.einsum("bts,bse->bte", weights, x, out_sharding=out_sharding("batch", "sequence", None))


@dataclass(frozen=True)
class MaskedLMConfig:
    """What each token was before it was masked: logits over the vocabulary (BERT, section 3.1).

    Attributes:
      dense: what stands before them; None is nothing.
      tied: whether they read from the table of tokens.
      bias: add a learned number to each.
    """

    dense: DenseConfig | None = field(default_factory=lambda: DenseConfig("gelu_exact", norm=True))
    tied: bool = True
    bias: bool = True
    name: ClassVar[str] = "masked_lm"

    def outputs(self, vocab_size: int) -> int:
        """How many logits there are."""
        return vocab_size


@dataclass(frozen=True)
class ClassifierConfig:
    """Logits of labels: of each document, the same at all of its tokens, or of each token.

    Attributes:
      labels: how many.
      pooling: what stands for a document; None classifies each token by itself.
      dense: what stands before the logits; None is nothing.
      dropout: share of what they are read from that is dropped in training.
    """

    labels: int = 2
    pooling: FirstToken | MeanOfTokens | None = field(default_factory=FirstToken)
    dense: DenseConfig | None = field(default_factory=DenseConfig)
    dropout: float = 0.0

    def __post_init__(self):
        if self.labels < 1:
            raise ValueError("labels must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and under 1")

    @property
    def name(self) -> str:
        """Where its parameters are."""
        return "document_labels" if self.pooling else "token_labels"

    def outputs(self, vocab_size: int) -> int:
        """How many logits there are."""
        del vocab_size
        return self.labels


@dataclass(frozen=True)
class PooledConfig:
    """A vector of each document, the same at all of its tokens, and no logits: not to be trained by targets.

    Attributes:
      pooling: what stands for a document.
      dense: what it goes through; None is nothing.
    """

    pooling: FirstToken | MeanOfTokens = field(default_factory=FirstToken)
    dense: DenseConfig | None = field(default_factory=DenseConfig)
    name: ClassVar[str] = "pooled"

    def outputs(self, vocab_size: int) -> int:
        """How many logits there are."""
        del vocab_size
        return 0


HeadConfig = MaskedLMConfig | ClassifierConfig | PooledConfig


class Dense(nn.Module):
    """Applies the map that `config` describes, to a width W."""

    config: DenseConfig
    width: int
    norm: RMSNormConfig | LayerNormConfig
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T W"]:
        """The mapped activations."""
        c, inputs = self.config, (x.shape[-1],)
        y = Linear(inputs, (self.width,), ("embed", "norm"), self.std, c.bias, self.dtypes, name="map")(x)
        y = ACTIVATIONS[c.activation](y)
        return self.norm.build(self.dtypes, name="norm")(y) if c.norm else y


class Head(nn.Module):
    """A head's own parameters.

    Attributes:
      config: the head.
      outputs: logits that it gives.
      width: of what they are read from W.
      norm: of the model.
      initial: how its weights start.
      dtypes: of the model.
    """

    config: HeadConfig
    outputs: int
    width: int
    norm: RMSNormConfig | LayerNormConfig
    initial: Normal
    dtypes: Dtypes

    def setup(self):
        """Declares the map, and the table and bias of logits."""
        c, labels = self.config, isinstance(self.config, ClassifierConfig)
        if c.dense:
            std = self.initial.hidden_std(self.width)
            self.dense = Dense(c.dense, self.width, self.norm, std, self.dtypes)
        if labels or (isinstance(c, MaskedLMConfig) and not c.tied):
            self.readout = Embedding(
                self.outputs, self.width, ("vocab", "embed"), self.initial.std, self.dtypes
            )
        if labels or (isinstance(c, MaskedLMConfig) and c.bias):
            self.readout_bias = Bias(self.outputs, self.dtypes)
        self.drop = Dropout(c.dropout if isinstance(c, ClassifierConfig) else 0.0)

    def __call__(
        self, x: Float[Array, "B T E"], segments: Int[Array, "B T"], deterministic: bool
    ) -> Float[Array, "B T W"]:
        """What the logits are read from; of a document, at all of its tokens."""
        c = self.config
        if not isinstance(c, MaskedLMConfig) and c.pooling:
            x = pool(x, segments, c.pooling)
        if c.dense:
            x = self.dense(x)
        x = self.drop(x, deterministic=deterministic)
        return x if isinstance(c, PooledConfig) else x * self.initial.readout_scale(self.width)

    def table(self, embedding: Float[Array, "V W"]) -> Float[Array, "outputs W"]:
        """What the logits are products with, given the table of tokens."""
        return embedding if isinstance(self.config, MaskedLMConfig) and self.config.tied else self.readout()

    def bias(self) -> Float[Array, " outputs"] | None:
        """What is added to the logits."""
        return (
            None if isinstance(self.config, MaskedLMConfig) and not self.config.bias else self.readout_bias()
        )
