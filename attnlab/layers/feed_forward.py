"""The position-wise half of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.layers.linear import Linear
from attnlab.layers.parameters import Dtypes


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

    The derivative is saved in place of the input, so that the backward pass computes no tanh again.
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


@dataclass(frozen=True)
class MLP:
    """activation(x W1) W2 (Vaswani et al. 2017, equation 2); `width` None is four model widths."""

    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "gelu_quick", "relu", "silu"] = "gelu"
    bias: bool = True

    def hidden(self, embed: int) -> int:
        """The inner width F."""
        return self.width or 4 * embed


@dataclass(frozen=True)
class GatedMLP:
    """(activation(x Wg) * x W1) W2: SwiGLU by "silu", GeGLU by "gelu" (arXiv 2002.05202, equation 6).

    `width` None is 8/3 model widths, rounded up to a multiple of 8: as many weights as an `MLP`.
    """

    width: int | None = None
    activation: Literal["gelu", "gelu_exact", "gelu_quick", "relu", "silu"] = "silu"
    bias: bool = False

    def hidden(self, embed: int) -> int:
        """The inner width F."""
        return self.width or -(-8 * embed // 24) * 8


class FeedForward(nn.Module):
    """Applies the feed-forward layer that `config` describes."""

    config: MLP | GatedMLP
    std: float
    out_std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The transformed activations."""
        config, embed = self.config, x.shape[-1]
        hidden = config.hidden(embed)
        activation = ACTIVATIONS[config.activation]

        def up(name: str) -> Array:
            return Linear(
                (embed,), (hidden,), ("embed", "mlp"), self.std, config.bias, self.dtypes, name=name
            )(x)

        y = activation(up("gate")) * up("up") if isinstance(config, GatedMLP) else activation(up("up"))
        return Linear(
            (hidden,), (embed,), ("mlp", "embed"), self.out_std, config.bias, self.dtypes, name="down"
        )(y)
