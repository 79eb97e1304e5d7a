"""Linear maps between groups of named dimensions, and embedding tables."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.positions import lookup_rows
from attnlab.layers.parameters import Dtypes, parameter
from attnlab.sharding import out_sharding


class Linear(nn.Module):
    """y = x W + b over groups of dimensions, such as (embed) -> (heads, head_dim) or the reverse.

    Attributes:
      inputs: sizes of the contracted trailing dimensions.
      outputs: sizes of the new dimensions.
      axes: logical axis names of inputs, then outputs.
      std: standard deviation of the initial weights.
      bias: whether to add a bias b, which starts at zero.
      dtypes: dtypes of parameters and computation.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        """Return x W + b."""
        kernel = parameter(
            self, "kernel", (*self.inputs, *self.outputs), self.axes, self.dtypes, std=self.std
        )
        out_axes = self.axes[len(self.inputs) :]
        # The model width is sharded in parameters only, never in activations.
        y = contract(x, kernel, len(self.inputs), out_axes)
        return add_bias(self, y, self.outputs, out_axes, self.dtypes) if self.bias else y


def contract(
    x: Float[Array, "B T *inputs"], kernel: Float[Array, "..."], num_inputs: int, out_axes: tuple[str, ...]
) -> Float[Array, "B T *outputs"]:
    """Contract the last `num_inputs` dimensions of `x` with the first ones of `kernel`.

    Batch and length are merged into one dimension, because XLA's CPU backend is slow with two.
    Other backends are not affected.
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
    """Return y + b for a parameter b of `module` that starts at zero.

    b is not sharded along the model width.
    """
    axes = tuple("norm" if a == "embed" else a for a in out_axes)
    return y + jnp.expand_dims(parameter(module, "bias", outputs, axes, dtypes), (0, 1))


class Embedding(nn.Module):
    """An embedding table with one row of width E for each of `size` ids."""

    size: int
    width: int
    axes: tuple[str, str]
    std: float
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Float[Array, "V E"]:
        """Return the table."""
        return parameter(self, "table", (self.size, self.width), self.axes, self.dtypes, std=self.std)


class Bias(nn.Module):
    """A learned bias for each of `size` ids, which starts at zero."""

    size: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Float[Array, " V"]:
        """Return the biases."""
        return parameter(self, "bias", (self.size,), ("vocab",), self.dtypes)


def look_up(table: Float[Array, "V E"], ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Return the table's row of each id, sharded as activations; ids must be in range."""
    return lookup_rows(table, ids, out_sharding("batch", "sequence", None))
