"""One-dimensional convolution over the length of a sequence, as in Whisper's encoder."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from attnlab.errors import InputError
from attnlab.layers.linear import Dtypes, add_bias, parameter
from attnlab.sharding import constrain, out_sharding


class Convolution1d(nn.Module):
    """y_t = sum over k of x_{stride t + k - padding} W_k + b, with x zero beyond both ends.

    Attributes:
      inputs: number of input channels.
      outputs: number of output channels.
      size: number of taps k; the kernel has shape (size, inputs, outputs).
      axes: logical axis names of the inputs and the outputs; at most one may be "embed".
      std: standard deviation of the initial weights.
      bias: whether to add a bias b, which starts at zero.
      dtypes: dtypes of parameters and computation.
      stride: input steps per output step.
      padding: number of zeros before and after the input.
    """

    inputs: int
    outputs: int
    size: int
    axes: tuple[str, str]
    std: float
    bias: bool
    dtypes: Dtypes
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B S inputs"]) -> Float[Array, "B T outputs"]:
        """Return the convolution in the compute dtype; T = (S + 2 padding - size) // stride + 1.

        Raises:
          InputError: the padded sequence is shorter than the kernel.
        """
        if x.shape[1] + 2 * self.padding < self.size:
            raise InputError(
                f"a convolution of {self.size} taps needs a length of at least "
                f"{self.size - 2 * self.padding}, not {x.shape[1]}"
            )
        shape = (self.size, self.inputs, self.outputs)
        kernel = parameter(self, "kernel", shape, ("window", *self.axes), self.dtypes, std=self.std)
        y = jax.lax.conv_general_dilated(
            constrain(x, "batch", None, None).astype(kernel.dtype),
            kernel,
            window_strides=(self.stride,),
            padding=[(self.padding, self.padding)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            out_sharding=out_sharding("batch", None, self.axes[1]),
        )
        return add_bias(self, y, (self.outputs,), self.axes[1:], self.dtypes) if self.bias else y
