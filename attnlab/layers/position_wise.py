"""Layers that compute each position by itself: norms, MLP and gated MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnlab.attention.arrays import rms_norm, wide
from attnlab.errors import check_fields
from attnlab.layers.linear import Dtypes, Linear, parameter
from attnlab.sharding import has_rules


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
        return _affine(rms_norm(_widened(x), None, self.config.epsilon, axes), scale, None, x.dtype)


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
        bias = _vector(self, "bias", x, 0.0) if self.config.bias else None
        axes = tuple(range(-len(self.axes), 0))
        y = rms_norm(y - y.mean(axis=axes, keepdims=True), None, self.config.epsilon, axes)
        return _affine(y, scale, bias, x.dtype)


def _vector(module: RMSNorm | LayerNorm, name: str, x: Array, mean: float) -> Array:
    """Declare a parameter over the normalised dimensions of `x`."""
    shape = x.shape[-len(module.axes) :]
    return parameter(module, name, shape, module.axes, module.dtypes, mean=mean, wide=True)


def _widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(wide(x))


def _affine(y: Array, scale: Array, bias: Array | None, dtype) -> Array:
    """Return y * scale + bias in a dtype.

    On a mesh, each device adds up the gradients of scale and bias in the dtype of `y`, and rounds
    them to `dtype` before the sum over devices, as with those of matrices. There it has gradients
    of any order, but no forward-mode derivative.
    """
    affine = _affine_on_mesh if has_rules() and y.dtype != dtype else _plain_affine
    return affine(y, scale, bias, dtype)


def _plain_affine(y, scale, bias, dtype):
    rows = range(y.ndim - scale.ndim)
    y = y * jnp.expand_dims(scale, rows)
    return (y if bias is None else y + jnp.expand_dims(bias, rows)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine_on_mesh(y, scale, bias, dtype):
    return _plain_affine(y, scale, bias, dtype)


def _affine_forward(y, scale, bias, dtype):
    return _plain_affine(y, scale, bias, dtype), (y, scale, bias is not None)


def _affine_backward(dtype, residuals, g):
    y, scale, has_bias = residuals
    g, num_rows = g.astype(y.dtype), y.ndim - scale.ndim
    rows, spec = tuple(range(num_rows)), jax.typeof(y).sharding.spec
    row_axes = set(jax.tree.leaves(list(spec[:num_rows])))  # None has no leaf

    def row_sum(x):
        of_device = jax.lax.reduce_sum(x, rows, out_sharding=P(*spec[num_rows:], unreduced=row_axes))
        return jax.sharding.reshard(of_device.astype(dtype), P(*spec[num_rows:])).astype(x.dtype)

    return g * jnp.expand_dims(scale, rows), row_sum(g * y), row_sum(g) if has_bias else None


_affine_on_mesh.defvjp(_affine_forward, _affine_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the tanh approximation of GELU.

    Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2. The forward pass saves the derivative
    instead of the input, so the backward pass does not recompute the tanh.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    c = 0.7978845608028654  # sqrt(2 / pi)
    t = jnp.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope.astype(x.dtype)


gelu.defvjp(_gelu_forward, lambda slope, g: (g * slope,))

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_width(width: int | None) -> None:
    """Check the inner width of a feed-forward layer.

    Raises:
      ValueError: it is below 1.
    """
    if width is not None and width < 1:
        raise ValueError(f"width={width} must be at least 1, or none")


@dataclass(frozen=True)
class MLPConfig:
    """activation(x W1) W2 (Vaswani et al. 2017, equation 2).

    Attributes:
      width: inner width F; None means 4 E.
      activation: name of the activation function.
      bias: whether the linear maps have biases.
    """

    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "gelu_quick", "relu", "silu"] = "gelu"
    bias: bool = True

    def __post_init__(self):
        check_width(self.width)

    def hidden(self, embed: int) -> int:
        """Return the inner width F."""
        return self.width or 4 * embed

    def build(self, std: float, out_std: float, dtypes: Dtypes, name: str | None = None) -> "MLP":
        """Return the module of this config; see `MLP`."""
        return MLP(self, std, out_std, dtypes, name=name)


@dataclass(frozen=True)
class GatedMLPConfig:
    """(activation(x Wg) * x W1) W2 (arXiv 2002.05202, equation 6).

    SwiGLU has the activation "silu", GeGLU has "gelu".

    Attributes:
      width: inner width F; None means 8/3 E rounded up to a multiple of 8, which gives the
        parameter count of the default `MLPConfig`.
      activation: name of the activation function of the gate.
      bias: whether the linear maps have biases.
    """

    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "gelu_quick", "relu", "silu"] = "silu"
    bias: bool = False

    def __post_init__(self):
        check_width(self.width)

    def hidden(self, embed: int) -> int:
        """Return the inner width F."""
        return self.width or -(-8 * embed // 24) * 8

    def build(self, std: float, out_std: float, dtypes: Dtypes, name: str | None = None) -> "GatedMLP":
        """Return the module of this config; see `GatedMLP`."""
        return GatedMLP(self, std, out_std, dtypes, name=name)


class MLP(nn.Module):
    """A feed-forward layer of two linear maps; see `MLPConfig`.

    Attributes:
      config: width, activation and bias.
      std: standard deviation of the initial weights of the first map.
      out_std: standard deviation of the initial weights of the last map.
      dtypes: dtypes of parameters and computation.
    """

    config: MLPConfig
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Return the layer's output."""
        activation = ACTIVATIONS[self.config.activation]
        return _down(self, activation(_up(self, "up", x)), x.shape[-1])


class GatedMLP(nn.Module):
    """A feed-forward layer with a multiplicative gate; see `GatedMLPConfig`.

    Attributes:
      config: width, activation and bias.
      std: standard deviation of the initial weights of the first two maps.
      out_std: standard deviation of the initial weights of the last map.
      dtypes: dtypes of parameters and computation.
    """

    config: GatedMLPConfig
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Return the layer's output."""
        activation = ACTIVATIONS[self.config.activation]
        return _down(self, activation(_up(self, "gate", x)) * _up(self, "up", x), x.shape[-1])


def _up(module: MLP | GatedMLP, name: str, x: Float[Array, "B T E"]) -> Float[Array, "B T F"]:
    c, embed = module.config, x.shape[-1]
    sizes = (embed,), (c.hidden(embed),)
    linear = Linear(*sizes, ("embed", "mlp"), module.std, c.bias, module.dtypes, name=name)
    return checkpoint_name(linear(x), "mlp_hidden")


def _down(module: MLP | GatedMLP, y: Float[Array, "B T F"], embed: int) -> Float[Array, "B T E"]:
    sizes = (y.shape[-1],), (embed,)
    bias, dtypes = module.config.bias, module.dtypes
    linear = Linear(*sizes, ("mlp", "embed"), module.out_std, bias, dtypes, name="down")
    return checkpoint_name(linear(y), "branch_out")
