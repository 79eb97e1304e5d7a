"""Normalisation over the model width, in float32."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.layers.parameters import Dtypes, parameter


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * scale (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    `from_one` keeps scale - 1 as the parameter, which weight decay then pulls to a scale of 1 (Gemma).
    """

    epsilon: float = 1e-6
    from_one: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * scale + bias (Ba et al. 2016, arXiv 1607.06450, equation 4)."""

    epsilon: float = 1e-5
    bias: bool = True


class Norm(nn.Module):
    """Applies the norm that `config` describes to the last dimension, or to as many as `axes` names."""

    config: RMSNorm | LayerNorm
    dtypes: Dtypes
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """The normalised activations, in the input's dtype."""
        config, over = self.config, tuple(range(-len(self.axes), 0))
        from_one = isinstance(config, RMSNorm) and config.from_one
        scale = 1.0 + self._vector("scale", x, 0.0) if from_one else self._vector("scale", x, 1.0)
        y = x.astype(jnp.float32)
        if isinstance(config, LayerNorm):
            y = y - y.mean(axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=over, keepdims=True) + config.epsilon)
        y = y * scale
        if isinstance(config, LayerNorm) and config.bias:
            y = y + self._vector("bias", x, 0.0)
        return y.astype(x.dtype)

    def _vector(self, name: str, x: Array, mean: float) -> Array:
        n = len(self.axes)
        vector = parameter(self, name, x.shape[-n:], self.axes, self.dtypes, mean=mean)
        return jnp.expand_dims(vector, tuple(range(x.ndim - n))).astype(jnp.float32)
