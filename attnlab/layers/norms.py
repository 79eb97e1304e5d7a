"""Normalisation over the model width, in float32."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.layers.parameters import Dtypes, parameter


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * scale (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

    epsilon: float = 1e-6


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / std * scale + bias (Ba et al. 2016, arXiv 1607.06450, equation 4)."""

    epsilon: float = 1e-5
    bias: bool = True


class Norm(nn.Module):
    """Applies the norm that `config` describes to the last dimension."""

    config: RMSNorm | LayerNorm
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """The normalised activations, in the input's dtype."""
        scale = self._vector("scale", x, 1.0)
        y = x.astype(jnp.float32)
        if isinstance(self.config, LayerNorm):
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.epsilon)
        y = y * scale
        if isinstance(self.config, LayerNorm) and self.config.bias:
            y = y + self._vector("bias", x, 0.0)
        return y.astype(x.dtype)

    def _vector(self, name: str, x: Array, mean: float) -> Array:
        vector = parameter(self, name, x.shape[-1:], ("norm",), self.dtypes, mean=mean)
        return jnp.expand_dims(vector, tuple(range(x.ndim - 1))).astype(jnp.float32)
