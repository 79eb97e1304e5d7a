"""Linear maps between named groups of dimensions, and token tables."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.positions import lookup_rows
from attnlab.layers.parameters import Dtypes, parameter
from attnlab.sharding import out_sharding


class Linear(nn.Module):
    """y = x W + b over the trailing input dimensions, as (embed)->(heads, head_dim) or back.

    Attributes:
      inputs: sizes of the contracted dimensions.
      outputs: sizes of the new dimensions.
      axes: logical names of inputs, then outputs.
      std: deviation of the initial weights.
      bias: whether b is there; it starts at zero.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        """The mapped activations."""
        kernel = parameter(
            self, "kernel", (*self.inputs, *self.outputs), self.axes, self.dtypes, std=self.std
        )
        out_axes = self.axes[len(self.inputs) :]
        # As an activation the model width is whole: only a parameter's is cut.
        y = contract(x, kernel, len(self.inputs), out_axes)
        return add_bias(self, y, self.outputs, out_axes, self.dtypes) if self.bias else y


def contract(
    x: Float[Array, "B T *inputs"], kernel: Float[Array, "..."], num_inputs: int, out_axes: tuple[str, ...]
) -> Float[Array, "B T *outputs"]:
    """Contracts the last `num_inputs` dimensions of `x` with the first of `kernel`.

    Batch and length become one dimension of rows: XLA's CPU backend is slow with two, others do not mind.
    """
    b, t = x.shape[:2]
    rows = x.reshape(b * t, *x.shape[2:])
    inputs, outputs = "hijk"[:num_inputs], "xyz"[: len(out_axes)]
    y = jnp.einsum(
        f"n{inputs},{inputs}{outputs}->n{outputs}",
        rows,
        kernel,
        out_sharding=out_sharding("batch", *out_axes),
    )
    return y.reshape(b, t, *y.shape[1:], out_sharding=out_sharding("batch", "sequence", *out_axes))


def add_bias(
    module: nn.Module,
    y: Float[Array, "B T *outputs"],
    outputs: tuple[int, ...],
    out_axes: tuple[str, ...],
    dtypes: Dtypes,
) -> Float[Array, "B T *outputs"]:
    """y + b, with b a parameter of `module` that starts at zero; along the model width it is stored whole."""
    axes = tuple("norm" if a == "embed" else a for a in out_axes)
    return y + jnp.expand_dims(parameter(module, "bias", outputs, axes, dtypes), (0, 1))


class Embedding(nn.Module):
    """A table of one row of width E for each of `size` ids."""

    size: int
    width: int
    axes: tuple[str, str]
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Float[Array, "V E"]:
        """The table itself."""
        return parameter(self, "table", (self.size, self.width), self.axes, self.dtypes, std=self.std)


class Bias(nn.Module):
    """A number for each of `size` ids, from zero."""

    size: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Float[Array, " V"]:
        """The numbers themselves."""
        return parameter(self, "bias", (self.size,), ("vocab",), self.dtypes)


def look_up(table: Float[Array, "V E"], ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Return the table's row of each id, laid out as activations; ids must be in range."""
    return lookup_rows(table, ids, out_sharding("batch", "sequence", None))
