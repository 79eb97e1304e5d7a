"""Normalisation over the model width, in at least float32."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import rms_norm, wide
from attnlab.errors import check_fields
from attnlab.layers.linear import Dtypes, parameter


@dataclass(frozen=True)
class RMSNormConfig:
    """x / rms(x) * scale (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Attributes:
      epsilon: added to the mean square.
      zero_centered_scale: store scale - 1, so that weight decay pulls the scale to 1 (Gemma).
    """

    epsilon: float = 1e-6
    zero_centered_scale: bool = False

    def __post_init__(self):
        check_fields(self, "epsilon", least=0)

    def build(self, dtypes: Dtypes, axes: tuple[str, ...] = ("norm",), name: str | None = None) -> "RMSNorm":
        """Return the module of this config; see `RMSNorm`."""
        return RMSNorm(self, dtypes, axes, name=name)


@dataclass(frozen=True)
class LayerNormConfig:
    """(x - mean) / std * scale + bias (Ba et al. 2016, arXiv 1607.06450, equation 4).

    Attributes:
      epsilon: added to the variance.
      bias: whether to add a bias.
    """

    epsilon: float = 1e-5
    bias: bool = True

    def __post_init__(self):
        check_fields(self, "epsilon", least=0)

    def build(
        self, dtypes: Dtypes, axes: tuple[str, ...] = ("norm",), name: str | None = None
    ) -> "LayerNorm":
        """Return the module of this config; see `LayerNorm`."""
        return LayerNorm(self, dtypes, axes, name=name)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last `len(axes)` dimensions.

    Attributes:
      config: see `RMSNormConfig`.
      dtypes: dtypes of the parameters.
      axes: logical axis names of the normalised dimensions.
    """

    config: RMSNormConfig
    dtypes: Dtypes
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Return the normalised activations, in the input's dtype."""
        if self.config.zero_centered_scale:
            scale = 1.0 + _vector(self, "scale", x, 0.0)
        else:
            scale = _vector(self, "scale", x, 1.0)
        axes = tuple(range(-len(self.axes), 0))
        return rms_norm(_widened(x), scale, self.config.epsilon, axes).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last `len(axes)` dimensions.

    Attributes:
      config: see `LayerNormConfig`.
      dtypes: dtypes of the parameters.
      axes: logical axis names of the normalised dimensions.
    """

    config: LayerNormConfig
    dtypes: Dtypes
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        """Return the normalised activations, in the input's dtype."""
        scale, y = _vector(self, "scale", x, 1.0), _widened(x)
        axes = tuple(range(-len(self.axes), 0))
        y = rms_norm(y - y.mean(axis=axes, keepdims=True), scale, self.config.epsilon, axes)
        if self.config.bias:
            y = y + _vector(self, "bias", x, 0.0)
        return y.astype(x.dtype)


def _vector(module: RMSNorm | LayerNorm, name: str, x: Array, mean: float) -> Array:
    """Declare a parameter over the normalised dimensions of `x`, broadcastable to `x`."""
    n = len(module.axes)
    vector = parameter(module, name, x.shape[-n:], module.axes, module.dtypes, mean=mean, wide=True)
    return jnp.expand_dims(vector, tuple(range(x.ndim - n)))


def _widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(wide(x))
