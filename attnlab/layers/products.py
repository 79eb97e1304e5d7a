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


def product(
    x: Float[Array, "*rows_and_inputs"],
    kernel: Float[Array, "*inputs_and_outputs"],
    num_inputs: int,
    where: Any,
    products: str = "compute",
) -> Float[Array, "*rows_and_outputs"]:
    """Return the product over the last `num_inputs` dimensions of `x` and the first of `kernel`.

    "int8" and "fp8" round each row of `x` and each column of `kernel` to 8 bits, scaled to its
    largest magnitude, and multiply in 8 bits. Sums of int8 are exact in int32, those of fp8 (e4m3)
    are float32. Gradients are those of the product that is not rounded (the straight-through
    estimator, Bengio et al. 2013, arXiv 1308.3432), in the compute dtype.

    Args:
      x: activations, (*rows, *inputs).
      kernel: weights, (*inputs, *outputs).
      num_inputs: number of contracted dimensions.
      where: sharding of the result; None without a mesh.
      products: "compute", "int8" or "fp8".

    Raises:
      InputError: qwix is not installed.
    """
    if products == "compute":
        return _product(num_inputs, where, x, kernel)
    return _quantized_product(num_inputs, where, products, x, kernel)


def _product(num_inputs: int, where: Any, x: Array, kernel: Array) -> Array:
    rows, inputs = "bt"[: x.ndim - num_inputs], "hijk"[:num_inputs]
    outputs = "xyz"[: kernel.ndim - num_inputs]
    return jnp.einsum(f"{rows}{inputs},{inputs}{outputs}->{rows}{outputs}", x, kernel, out_sharding=where)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _quantized_product(num_inputs: int, where: Any, products: str, x: Array, kernel: Array) -> Array:
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            f"dtypes.products={products} requires the package qwix, which is not installed: "
            'pip install "attnlab[quant]"'
        ) from error
    rows = range(x.ndim - num_inputs)
    inputs, outputs = range(x.ndim)[-num_inputs:], range(num_inputs, kernel.ndim)
    left, right = (
        qwix.quantize(
            y.astype(jnp.float32),
            QUANTIZED[products],
            channelwise_axes=axes,
            calibration_method=CALIBRATION[products],
        )
        for y, axes in ((x, rows), (kernel, outputs))
    )
    dimensions = (tuple(inputs), tuple(range(num_inputs))), ((), ())
    return qwix.dot_general(left, right, dimensions, out_sharding=where).astype(x.dtype)


def _forward(num_inputs: int, where: Any, products: str, x: Array, kernel: Array):
    return _quantized_product(num_inputs, where, products, x, kernel), (x, kernel)


def _backward(num_inputs: int, where: Any, products: str, residuals, d_out: Array):
    _, pull_back = jax.vjp(partial(_product, num_inputs, where), *residuals)
    return pull_back(d_out)


_quantized_product.defvjp(_forward, _backward)
