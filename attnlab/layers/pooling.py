"""Pooling of a sequence of tokens to one vector."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import wide
from attnlab.layers.attention import AttentionConfig, EncoderOutput, SequenceInputs, documents
from attnlab.layers.cross_attention import CrossAttention
from attnlab.layers.linear import Dtypes, Embedding, Linear
from attnlab.layers.position_wise import GatedMLPConfig, LayerNormConfig, MLPConfig, RMSNormConfig
from attnlab.layers.specs import Bidirectional, NoPositions
from attnlab.sharding import constrain, gather_length


@dataclass(frozen=True)
class ClassToken:
    """The first token x, or tanh(x W + b) with `dense` (BERT, arXiv 1810.04805)."""

    dense: bool = False


@dataclass(frozen=True)
class Mean:
    """The mean of the tokens after the prefix tokens."""


@dataclass(frozen=True)
class ClassAndMean:
    """The first token concatenated with the mean of the tokens after the prefix tokens.

    DINOv2, arXiv 2304.07193.
    """


@dataclass(frozen=True)
class Distilled:
    """Half the class token concatenated with half the distillation token.

    A linear map of this vector is the mean of the two heads of DeiT (arXiv 2012.12877, section 4).
    """


@dataclass(frozen=True)
class Probe:
    """y + MLP(norm(y)), where y is the attention of one learned query to all tokens.

    Set Transformer, arXiv 1810.00825, section 3.2.
    """


Pooling: TypeAlias = ClassToken | Mean | ClassAndMean | Distilled | Probe


def pooled_width(pooling: Pooling, width: int) -> int:
    """Return the width of the pooled vector for tokens of the given width."""
    return width * (2 if isinstance(pooling, ClassAndMean | Distilled) else 1)


class Pool(nn.Module):
    """Pools the tokens of each row to one vector.

    Attributes:
      config: kind of pooling.
      num_prefix_tokens: number of leading tokens excluded from a mean.
      attention: attention config of `Probe`.
      feed_forward: feed-forward config of `Probe`.
      norm: norm config of `Probe`.
      std: standard deviation of the initial weights.
      dtypes: dtypes of parameters and computation.
    """

    config: Pooling
    num_prefix_tokens: int
    attention: AttentionConfig
    feed_forward: MLPConfig | GatedMLPConfig
    norm: RMSNormConfig | LayerNormConfig
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, tokens: EncoderOutput) -> Float[Array, "B 1 pooled"]:
        """Return one vector per row; tokens of segment 0 (padding) are ignored."""
        tokens = replace(tokens, hidden=gather_length(tokens.hidden))
        x, config = tokens.hidden, self.config
        if isinstance(config, Probe):
            return self._probe(tokens)
        if isinstance(config, Mean):
            return self._mean(tokens)
        if isinstance(config, ClassAndMean):
            return jnp.concatenate([x[:, :1], self._mean(tokens)], axis=-1)
        if isinstance(config, Distilled):
            return 0.5 * jnp.concatenate([x[:, :1], x[:, 1:2]], axis=-1)
        if not config.dense:
            return x[:, :1]
        e = x.shape[-1]
        dense = Linear((e,), (e,), ("embed", "norm"), self.std, True, self.dtypes, name="dense")
        return jnp.tanh(dense(x[:, :1]))

    def _mean(self, tokens: EncoderOutput) -> Float[Array, "B 1 E"]:
        x = tokens.hidden[:, self.num_prefix_tokens :]
        # Count and sum in at least float32: bfloat16 rounds 729 patches to 728.
        valid = tokens.segments[:, self.num_prefix_tokens :, None] > 0
        valid = valid.astype(wide(x))
        count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
        return (jnp.sum(x * valid, axis=1, keepdims=True) / count).astype(x.dtype)

    def _probe(self, tokens: EncoderOutput) -> Float[Array, "B 1 E"]:
        b, _, e = tokens.hidden.shape
        probe = Embedding(1, e, ("sequence", "embed"), self.std, self.dtypes, name="probe")()
        query = constrain(jnp.broadcast_to(probe[None], (b, 1, e)), "batch", None, None)
        zero = jnp.zeros_like(tokens.segments[:, :1])
        inputs = SequenceInputs(documents(None, zero), positions=zero, memory=tokens)
        attention = CrossAttention(
            self.attention,
            Bidirectional(),
            NoPositions(),
            self.norm,
            None,
            self.std,
            self.std,
            self.dtypes,
            name="attention",
        )
        y, _, _ = attention(query, inputs)
        z = self.norm.build(self.dtypes, name="norm")(y)
        return y + self.feed_forward.build(self.std, self.std, self.dtypes, name="feed_forward")(z)
