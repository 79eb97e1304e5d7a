"""Matrix products of activations and weights, also in 8 bits (optional dependency qwix)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.errors import InputError

QUANTIZED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# qwix scales the largest magnitude to 448, the largest fp8 number, and for int8 to 127.5. That is
# halfway between two integers, and the compiled program would decide which one it becomes. The
# factor makes it 127.
CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def quantized_product(
    x: Float[Array, "*rows_and_inputs"],
    kernel: Float[Array, "*inputs_and_outputs"],
    num_inputs: int,
    where: Any,
    products: str,
) -> Float[Array, "*rows_and_outputs"]:
    """Return the product over the last `num_inputs` dimensions of `x` and the first of `kernel`.

    Each row of `x` and each column of `kernel` is rounded to 8 bits, scaled to its largest
    magnitude. Sums of int8 are exact in int32, those of fp8 (e4m3) are float32. Gradients are those
    of the product that is not rounded (the straight-through estimator, Bengio et al. 2013, arXiv
    1308.3432), in the compute dtype.

    Args:
      x: activations, (*rows, *inputs).
      kernel: weights, (*inputs, *outputs).
      num_inputs: number of contracted dimensions.
      where: sharding of the result; None without a mesh.
      products: "int8" or "fp8".

    Raises:
      InputError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            f"dtypes.products={products} requires the package qwix, which is not installed: "
            'pip install "attnlab[quant]"'
        ) from error
    rows, outputs = range(x.ndim - num_inputs), range(num_inputs, kernel.ndim)
    left, right = (
        qwix.quantize(
            y.astype(jnp.float32),
            QUANTIZED[products],
            channelwise_axes=axes,
            calibration_method=CALIBRATION[products],
        )
        for y, axes in ((x, rows), (kernel, outputs))
    )
    return qwix.dot_general(left, right, _dimensions(x, num_inputs), out_sharding=where).astype(x.dtype)


def _dimensions(x: Array, num_inputs: int):
    """Return the `dimension_numbers` of the product."""
    return (tuple(range(x.ndim)[-num_inputs:]), tuple(range(num_inputs))), ((), ())


def _forward(x: Array, kernel: Array, num_inputs: int, where: Any, products: str):
    return quantized_product(x, kernel, num_inputs, where, products), (x, kernel)


def _backward(num_inputs: int, where: Any, products: str, residuals, d_out: Array):
    dimensions = _dimensions(residuals[0], num_inputs)
    product = partial(jax.lax.dot_general, dimension_numbers=dimensions, out_sharding=where)
    return jax.vjp(product, *residuals)[1](d_out)


quantized_product.defvjp(_forward, _backward)
