"""Heads of text encoders: masked language modelling, classification and pooling."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention.arrays import wide
from attnlab.layers.linear import Bias, Dropout, Dtypes, Embedding, Linear, Normal, scaled
from attnlab.layers.position_wise import ACTIVATIONS, LayerNormConfig, RMSNormConfig
from attnlab.sharding import gather_length, out_sharding


@dataclass(frozen=True)
class DenseConfig:
    """A dense layer of a head: activation(x W + b), optionally followed by the model's norm.

    Attributes:
      activation: name of the activation function.
      bias: whether to add the bias b.
      norm: whether to normalise the result.
    """

    activation: Literal["tanh", "gelu", "gelu_exact", "relu", "silu"] = "tanh"
    bias: bool = True
    norm: bool = False


@dataclass(frozen=True)
class FirstToken:
    """Pools the first token of a document: BERT's class token (arXiv 1810.04805, section 3)."""

    def pooling_mask(self, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Return which tokens the mean is over."""
        return segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))


@dataclass(frozen=True)
class MeanOfTokens:
    """Pools the mean of a document's tokens (Sentence-BERT, arXiv 1908.10084, section 3)."""

    def pooling_mask(self, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Return which tokens the mean is over."""
        return segments > 0


def pool(
    x: Float[Array, "B T E"], segments: Int[Array, "B T"], pooling: FirstToken | MeanOfTokens
) -> Float[Array, "B T E"]:
    """Return the pooled vector of each token's document, and 0 at padding."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    # Count and average in at least float32: half precision rounds counts and their reciprocals.
    dtype = wide(x)
    pooled = (same & pooling.pooling_mask(segments)[:, None, :]).astype(dtype)
    weights = pooled / jnp.maximum(pooled.sum(-1, keepdims=True), 1)
    spec = out_sharding("batch", None, None)
    pooled = jnp.einsum("bts,bse->bte", weights, gather_length(x).astype(dtype), out_sharding=spec)
    return pooled.astype(x.dtype)


@dataclass(frozen=True)
class MaskedLMConfig:
    """Masked language modelling: logits of each token's original id (BERT, section 3.1).

    Attributes:
      dense: dense layer before the logits; None omits it.
      tied: whether the logits use the token embedding table as their weights.
      bias: add a learned bias to each logit.
    """

    dense: DenseConfig | None = field(default_factory=lambda: DenseConfig("gelu_exact", norm=True))
    tied: bool = True
    bias: bool = True
    name: ClassVar[str] = "masked_lm"

    def outputs(self, vocab_size: int) -> int:
        """Return the number of logits."""
        return vocab_size


@dataclass(frozen=True)
class ClassifierConfig:
    """Classification of documents (the logits are repeated at all of their tokens) or of tokens.

    Attributes:
      labels: number of labels.
      pooling: pooling of a document; None classifies each token separately.
      dense: dense layer before the logits; None omits it.
      dropout: dropout rate of the features before the logits in training.
    """

    labels: int = 2
    pooling: FirstToken | MeanOfTokens | None = field(default_factory=FirstToken)
    dense: DenseConfig | None = field(default_factory=DenseConfig)
    dropout: float = 0.0

    def __post_init__(self):
        if self.labels < 1:
            raise ValueError(f"labels={self.labels} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")

    @property
    def name(self) -> str:
        """Name of the head's parameters."""
        return "document_labels" if self.pooling else "token_labels"

    def outputs(self, vocab_size: int) -> int:
        """Return the number of logits."""
        del vocab_size
        return self.labels


@dataclass(frozen=True)
class PooledConfig:
    """One vector per document, repeated at all of its tokens; it has no logits and no loss.

    Attributes:
      pooling: pooling of a document.
      dense: dense layer after the pooling; None omits it.
    """

    pooling: FirstToken | MeanOfTokens = field(default_factory=FirstToken)
    dense: DenseConfig | None = field(default_factory=DenseConfig)
    name: ClassVar[str] = "pooled"

    def outputs(self, vocab_size: int) -> int:
        """Return the number of logits."""
        del vocab_size
        return 0


HeadConfig = MaskedLMConfig | ClassifierConfig | PooledConfig


class Dense(nn.Module):
    """The dense layer of a head, with an output of `width` W."""

    config: DenseConfig
    width: int
    norm: RMSNormConfig | LayerNormConfig
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T W"]:
        """Return the layer's output."""
        c, inputs = self.config, (x.shape[-1],)
        y = Linear(inputs, (self.width,), ("embed", "norm"), self.std, c.bias, self.dtypes, name="map")(x)
        y = ACTIVATIONS[c.activation](y)
        return self.norm.build(self.dtypes, name="norm")(y) if c.norm else y


class Head(nn.Module):
    """The parameters of a head, and its features before the logits.

    Attributes:
      config: kind of head.
      outputs: number of logits.
      width: width W of the features from which the logits are computed.
      norm: norm config of the model.
      initial: initialisation of the model.
      dtypes: dtypes of the model.
    """

    config: HeadConfig
    outputs: int
    width: int
    norm: RMSNormConfig | LayerNormConfig
    initial: Normal
    dtypes: Dtypes

    def setup(self):
        """Declare the dense layer, and the table and bias of the logits."""
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
        """Return the features of each token, or those of its document if the head pools."""
        c = self.config
        if not isinstance(c, MaskedLMConfig) and c.pooling:
            x = pool(x, segments, c.pooling)
        if c.dense:
            x = self.dense(x)
        x = self.drop(x, deterministic=deterministic)
        return x if isinstance(c, PooledConfig) else scaled(x, self.initial.readout_scale(self.width))

    def table(self, embedding: Embedding) -> Float[Array, "outputs W"]:
        """Return the weights of the logits as stored, given the token embedding."""
        tied = isinstance(self.config, MaskedLMConfig) and self.config.tied
        return (embedding if tied else self.readout)(gather=False)

    def bias(self) -> Float[Array, " outputs"] | None:
        """Return the bias of the logits, or None."""
        return (
            None if isinstance(self.config, MaskedLMConfig) and not self.config.bias else self.readout_bias()
        )
