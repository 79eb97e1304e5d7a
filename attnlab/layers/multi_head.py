"""`Attention`: multi-head attention as a Flax module for any model."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention import attend, softcap
from attnlab.attention.backends.registry import Backend
from attnlab.attention.masks.base import Mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.scores import Score
from attnlab.errors import InputError
from attnlab.layers.attention import AttentionConfig
from attnlab.layers.flax_attention import flatten_batch
from attnlab.layers.linear import Dtypes, Linear, parameter
from attnlab.layers.position_wise import LayerNormConfig, RMSNormConfig
from attnlab.layers.specs import Rotary


class Attention(nn.Module):
    """Multi-head attention: projections of queries, keys and values, `attend`, and a projection.

    It is called like `flax.linen.MultiHeadDotProductAttention` and has the parameters of that
    module: query, key, value and out, each with a kernel and optionally a bias.

    Attributes:
      heads: number of query heads H.
      kv_heads: number of key/value heads K; None means H, 1 is multi-query attention.
      head_dim: width D of a head; None means the width of the queries divided by H.
      out_features: width of the output; None means that of the queries.
      bias: projections that have a bias: all (true), none (false), or only those of the query, key
        and value ("qkv"), of the query, value and output ("qvo"), or of the output ("o").
      qk_norm: norm of queries and keys per head (arXiv 2010.04245, 2302.05442); None disables it.
      rotary: rotary position embedding of queries and keys; None disables it.
      softcap: softcap of the scores, after the scores of a call; None disables it.
      scale: factor of the scores; None means 1 / sqrt(D).
      sinks: add a learned logit without a value to each head's softmax (gpt-oss, arXiv 2508.10925).
      dropout: dropout rate of the attention weights in training.
      backend: backend of `attend`.
      std: standard deviation of the initial kernels; None means 1 / sqrt(width of their input).
      dtypes: dtypes of parameters and computation.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    bias: bool | Literal["qkv", "qvo", "o"] = False
    qk_norm: RMSNormConfig | LayerNormConfig | None = None
    rotary: Rotary | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    backend: str | Backend = "auto"
    std: float | None = None
    dtypes: Dtypes = Dtypes()

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*B T E"],
        inputs_k: Float[Array, "*B S M"] | None = None,
        inputs_v: Float[Array, "*B S N"] | None = None,
        *,
        mask: Mask | Array | Callable | None = None,
        score: Score | Callable | Sequence[Score | Callable] | None = None,
        normalizer: Callable = softmax,
        positions: Int[Array, "*#B T"] | None = None,
        key_positions: Int[Array, "*#B S"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B T out_features"]:
        """Return the layer's output, with any number of batch dimensions.

        Sows the weights before dropout as "attention_weights" if "intermediates" is mutable.

        Args:
          inputs_q: queries.
          inputs_k: keys; None means `inputs_q` (self-attention).
          inputs_v: values; None means `inputs_k`.
          mask: pairs that attend: a mask, a boolean array that broadcasts to (*B, H, T, S), or a
            function of (b, h, q, k). None allows every pair.
          score: modifies the scaled scores; see `attend`.
          normalizer: maps masked scores to weights; see `attend`.
          positions: positions of the queries for `rotary`; None counts from 0.
          key_positions: positions of the keys for `rotary`; None means `positions` in
            self-attention, and counts from 0 in cross-attention.
          deterministic: True for no dropout; otherwise an rng named "dropout" is needed. Required
            with `dropout`.

        Raises:
          InputError: `attend` rejects the arguments, an attribute is invalid, or `deterministic` is
            missing.
        """
        config = self._config(inputs_q.shape[-1])
        if inputs_k is None:
            if inputs_v is not None:
                raise InputError("Attention: inputs_v needs inputs_k")
            inputs_k, key_positions = inputs_q, positions if key_positions is None else key_positions
        inputs_v = inputs_k if inputs_v is None else inputs_v
        if self.dropout and deterministic is None:
            raise InputError("Attention: with dropout, pass deterministic=True or deterministic=False")
        batch, use_dropout = inputs_q.shape[:-2], bool(self.dropout) and not deterministic
        query = self._project("query", inputs_q, config, positions)
        key = self._project("key", inputs_k, config, key_positions)
        value = self._project("value", inputs_v, config, None)
        sow_weights = self.is_mutable_collection("intermediates")
        out = attend(
            *(query, key, value),
            mask=flatten_batch(jnp.asarray(mask), batch) if hasattr(mask, "dtype") else mask,
            score=_with_softcap(score, self.softcap),
            scale=self.scale,
            sinks=parameter(self, "sinks", (self.heads,), ("heads",), self.dtypes, wide=True)
            if self.sinks
            else None,
            normalizer=normalizer,
            dropout_rate=self.dropout,
            dropout_key=self.make_rng("dropout") if use_dropout else None,
            deterministic=not use_dropout,
            backend=self.backend,
            return_weights=sow_weights,
        )
        if sow_weights:
            out, weights = out
            self.sow("intermediates", "attention_weights", weights.reshape(*batch, *weights.shape[1:]))
        features = self.out_features or inputs_q.shape[-1]
        out = self._linear("out", out, (features,), ("heads", "head_dim", "embed"), config)
        return out.reshape(*batch, *out.shape[1:])

    def _config(self, width: int) -> AttentionConfig:
        """Return the attributes that models share; raise if one is invalid."""
        head_dim = self.head_dim or width // self.heads
        if self.head_dim is None and width % self.heads:
            raise InputError(
                f"Attention: heads={self.heads} must divide the width {width} of inputs_q, or set head_dim"
            )
        try:
            return AttentionConfig(
                heads=self.heads,
                kv_heads=self.kv_heads or self.heads,
                head_dim=head_dim,
                bias=self.bias,
                softcap=self.softcap,
                scale=self.scale,
                dropout=self.dropout,
            )
        except ValueError as error:
            raise InputError(f"Attention: {error}") from None

    def _project(
        self, name: str, x: Float[Array, "*B T E"], config: AttentionConfig, positions: Array | None
    ) -> Float[Array, "B T H D"]:
        """Return queries, keys or values with one batch dimension, normalised and rotated."""
        *batch, length, _ = x.shape
        x = x.reshape(-1, *x.shape[-2:]) if x.ndim != 3 else x
        axis = "heads" if name == "query" else "kv_heads"
        heads = config.heads if name == "query" else config.kv_heads
        y = self._linear(name, x, (heads, config.head_dim), ("embed", axis, "head_dim"), config)
        if name == "value":
            return y
        if self.qk_norm is not None:
            y = self.qk_norm.build(self.dtypes, name=f"{name}_norm")(y)
        if self.rotary is not None:
            positions = jnp.arange(length) if positions is None else positions
            y = self.rotary(y, jnp.broadcast_to(positions, (*batch, length)).reshape(-1, length))
        return y

    def _linear(self, name: str, x: Any, outputs: tuple, axes: tuple, config: AttentionConfig) -> Array:
        inputs = x.shape[2:]
        std = math.prod(inputs) ** -0.5 if self.std is None else self.std
        return Linear(inputs, outputs, axes, std, config.has_bias(name), self.dtypes, name=name)(x)


def _with_softcap(score: Any, cap: float | None) -> Any:
    if cap is None:
        return score
    scores = list(score) if isinstance(score, list | tuple) else [score]
    return [*scores, softcap(cap)]
