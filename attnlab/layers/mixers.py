"""Mixers: how a layer computes attention from its input, around the call of `attend`."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attnlab.attention import attend
from attnlab.attention.arrays import rms_norm
from attnlab.attention.variants import (
    differential,
    differential_factor,
    expand_latent,
    gated,
    latent,
    talking_heads,
    value_residual,
)
from attnlab.errors import InputError
from attnlab.layers.linear import Linear, parameter
from attnlab.layers.scores import Products
from attnlab.layers.specs import FirstValue, Mixer
from attnlab.sharding import constrain


@dataclass(frozen=True)
class TalkingHeads(Mixer):
    """Mixes the heads before and after the softmax, initially not (arXiv 2003.02436).

    The heads are not sharded, and the product of weights and values costs K times as much.
    """

    def attend(self, layer, query, key, value, score_of, **options):
        """See `Mixer.attend`."""
        h = query.shape[2]
        before, after = (
            parameter(
                layer, f"heads_{name}", (h, h), ("norm", "norm"), layer.dtypes, mean=np.eye(h), wide=True
            )
            for name in ("before", "after")
        )
        score = score_of(query, key)
        arrays = (constrain(x, "batch", "sequence", None, None) for x in (query, key, value))
        result = talking_heads(*arrays, before, after, score=score, **options)
        out, *weights = result if isinstance(result, tuple) else (result,)
        out = constrain(out, "batch", "sequence", "heads", None)
        return (out, *weights) if weights else out

    def products(self, sizes):
        """See `Mixer.products`: weights times the values of all K heads; two mixes of the heads."""
        (token, pair), (_, h, k, d) = super().products(sizes), sizes
        return Products(token + h * h * d, pair + h * h + h * (k - 1) * d)


@dataclass(frozen=True)
class GatedOutput(Mixer):
    """Multiplies the output by the sigmoid of a gate (arXiv 2505.06708, equation 5).

    Attributes:
      gates: one gate per element of the output, or one per head.
    """

    gates: Literal["element", "head"] = "element"

    def output(self, layer, x, out):
        """See `Mixer.output`."""
        shape = (out.shape[2], out.shape[3] if self.gates == "element" else 1)
        axes = ("embed", "heads", "head_dim")
        gate = Linear((x.shape[-1],), shape, axes, layer.std, False, layer.dtypes, name="gate")(x)
        return gated(out, gate)

    def products(self, sizes):
        """See `Mixer.products`."""
        token, pair = super().products(sizes)
        gates = sizes.heads * (sizes.head_dim if self.gates == "element" else 1)
        return Products(token + sizes.width * gates, pair)


@dataclass(frozen=True)
class ValueResidual(Mixer):
    """Adds the first layer's values to the values, with two learned weights (arXiv 2410.17897).

    The first layer is the first one with this mixer.
    """

    uses_first_value = True

    def mix_values(self, layer, value, first):
        """See `Mixer.mix_values`."""
        assert first is not None, "the stack of layers passes the first layer's values"
        weights = parameter(layer, "value_weights", (2,), ("norm",), layer.dtypes, mean=0.5, wide=True)
        mixed = jnp.where(first.found, value_residual(value, first.value, weights), value)
        return mixed, FirstValue(jnp.where(first.found, first.value, value), jnp.ones((), bool))


@dataclass(frozen=True)
class Differential(Mixer):
    """softmax(Q1 K1^T) - lambda softmax(Q2 K2^T), of the halves of each head (arXiv 2410.05258).

    Each head's output is normalised and multiplied by 1 - `init`. A score of the layer depends on
    whole heads and modifies both products.

    Attributes:
      init: lambda_init of equation 2, the same in all layers.
    """

    init: float = 0.8

    def __post_init__(self):
        if not 0 < self.init < 1:
            raise ValueError(f"init={self.init} must be over 0 and under 1")

    def project(self, layer, x, rotate):
        """See `Mixer.project`."""
        query, key, value = (layer.project(x, name) for name in ("query", "key", "value"))
        query, key = (jnp.concatenate([rotate(y) for y in _halves(z)], axis=-1) for z in (query, key))
        return query, key, value

    def attend(self, layer, query, key, value, score_of, **options):
        """See `Mixer.attend`."""
        d = query.shape[-1] // 2
        queries, keys = _halves(query), _halves(key)
        vectors = (
            parameter(layer, f"lambda_{name}", (2, d), ("norm", "norm"), layer.dtypes, std=0.1, wide=True)
            for name in ("queries", "keys")
        )
        scale = parameter(
            layer, "head_norm_scale", (value.shape[-1],), ("norm",), layer.dtypes, mean=1.0, wide=True
        )
        factor = differential_factor(*vectors, self.init)
        result = differential(queries, keys, value, factor, score=score_of(query, key), **options)
        out, *weights = result if isinstance(result, tuple) else (result,)
        out = (1 - self.init) * rms_norm(out, scale)
        return (out, *weights) if weights else out

    def products(self, sizes):
        """See `Mixer.products`: two products of half heads, and two with the whole values."""
        return Products(super().products(sizes).token, 3 * sizes.heads * sizes.head_dim)


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Multi-head latent attention: keys and values are projections of one vector per token.

    A KV cache stores `rank + rotary_dim` numbers per token (DeepSeek-V2, arXiv 2405.04434, section
    2.1). Of each query and key, `rotary_dim` components have rotary positions and head_dim have
    none.

    Attributes:
      rank: width R of the vector, which is normalised.
      rotary_dim: width of the part with positions, which all heads share for the keys.
      query_rank: width of a normalised vector that is projected to the queries; None projects the
        layer's input.
    """

    rank: int = 64
    rotary_dim: int = 16
    query_rank: int | None = None

    def __post_init__(self):
        if self.rank < 1 or self.rotary_dim < 2 or self.rotary_dim % 2 or (self.query_rank or 1) < 1:
            raise ValueError("rank and query_rank must be at least 1, rotary_dim even and at least 2")

    def cache_dims(self, kv_heads, head_dim):
        """Return the dimensions of the vector and of the rotated key; see `Mixer.cache_dims`."""
        return ((1, None), (self.rank, None)), ((1, None), (self.rotary_dim, None))

    def project(self, layer, x, rotate):
        """Return the queries, the vector and the rotated key of each token; see `Mixer.project`."""
        config, heads, d = layer.config, layer.config.heads, layer.head_dim(x.shape[-1])
        if config.qk_norm or config.has_bias("query") or config.kv_heads not in (None, heads):
            raise InputError(
                "mixer=LatentAttention supports no qk_norm, query biases or kv_heads under heads"
            )

        def linear(y, name, *outputs, axes=("norm",)):
            shape, names = (y.shape[-1],), ("embed" if y is x else "norm", *axes)
            return Linear(shape, outputs, names, layer.std, False, layer.dtypes, name=name)(y)

        def norm(y, name):
            return layer.norm.build(layer.dtypes, name=name)(y)

        source = x
        if self.query_rank:
            source = norm(linear(x, "query_down", self.query_rank), "query_norm")
        query = linear(source, "query", heads, d + self.rotary_dim, axes=("heads", "head_dim"))
        query = checkpoint_name(query, "query")
        query = jnp.concatenate([query[..., :d], rotate(query[..., d:])], axis=-1)
        # Keys and values are sharded over heads, so every device of a tensor axis needs both.
        names = "batch", "sequence", None
        vector = checkpoint_name(linear(x, "latent", self.rank), "key")
        vector = constrain(norm(vector, "latent_norm"), *names)
        rotated_key = checkpoint_name(linear(x, "rotated_key", self.rotary_dim), "key")
        rotated_key = rotate(constrain(rotated_key, *names)[:, :, None])
        return query, vector[:, :, None], rotated_key

    def attend(self, layer, query, key, value, score_of, **options):
        """See `Mixer.attend`."""
        heads, d = query.shape[2], query.shape[3] - self.rotary_dim
        up_key, up_value = (
            parameter(
                layer, name, (self.rank, heads, d), ("norm", "heads", "head_dim"), layer.dtypes, std=layer.std
            )
            for name in ("up_key", "up_value")
        )
        arrays = query[..., :d], query[..., d:], key[:, :, 0], value[:, :, 0], up_key, up_value
        if query.shape[1] == key.shape[1] or layer.spec.score is not None:
            query, key, value = expand_latent(*arrays)
            return attend(query, key, value, score=score_of(query, key), **options)
        return latent(*arrays, score=score_of(query, key), **options)

    def products(self, sizes):
        """See `Mixer.products`: keys and values are projected from the vectors, as in training."""
        width, heads, _, d = sizes
        query = heads * (d + self.rotary_dim)
        down = width * (self.rank + self.rotary_dim + (self.query_rank or 0))
        up = query * (self.query_rank or width) + 2 * heads * self.rank * d
        return Products(down + up + heads * d * width, heads * (2 * d + self.rotary_dim))


def _halves(x: Float[Array, "B T H D"]) -> Float[Array, "2 B T H D/2"]:
    return jnp.stack(jnp.split(x, 2, axis=-1))
