"""Flash attention with a bias, JAX's older kernel for TPUs, with what it lacks.

What it lacks (jax.experimental.pallas.ops.tpu.flash_attention) is done here: rows without keys, a
log-sum-exp with a gradient. Importing this brings Pallas along.
"""

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jaxtyping import Array, Float

from attnlab.attention.backends import vjp as cotangents
from attnlab.attention.backends.reference import NOTHING


class How(NamedTuple):
    """How the kernel runs.

    Attributes:
      tile: queries and keys of one.
      causal: whether the bias forbids every key after its query, so that such tiles need no visit.
      interpret: whether it runs as a plain JAX program, on any platform.
    """

    tile: tuple[int, int]
    causal: bool
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    how: How,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B H S D"],
    value: Float[Array, "B H S D"],
    bias: Float[Array, "B H T S"],
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Output and log-sum-exp.

    Args:
      how: see `How`.
      query: (B, H, T, D), scaled; T whole tiles, D at most 128 or a multiple of it.
      key: (B, H, S, D); S whole tiles.
      value: (B, H, S, D).
      bias: added to the scores, (B, H, T, S); -inf forbids.
    """
    return _forward(how, query, key, value, bias)[0]


def _forward(how, query, key, value, bias):
    q, k = how.tile
    empty = (bias <= NOTHING).all(-1)
    with _mode(how):
        out, total, top = flash._flash_attention_impl(
            *(query, key, value, _finite(bias), None, True, how.causal, 1.0, 1, q, k, k, False)
        )
    out = jnp.where(empty[..., None], 0, out)
    # The sum of a row without keys as 1 at a score of 0, beside which a forbidden one has weight 0.
    total, top = jnp.where(empty, 1, total), jnp.where(empty, 0, top)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return (out, lse), (query, key, value, bias, out, total, top)


def _backward(how, residuals, given):
    query, key, value, bias, out, total, top = residuals
    d_out, d_lse = given
    # JAX's own rule gives no log-sum-exp, so its two backward kernels are called from here.
    delta = cotangents.delta(out, d_out, d_lse)
    arrays = query, key, value, _finite(bias), None, total, top, d_out, delta
    q, k = how.tile
    tile = {"block_q_major": q, "block_k_major": k, "block_k": k, "causal": how.causal}
    more = {"sm_scale": 1.0, "mask_value": flash.DEFAULT_MASK_VALUE, "debug": False}
    with _mode(how):
        d_key, d_value = flash._flash_attention_bwd_dkv(*arrays, block_q=q, **tile, **more)
        d_query, d_bias = flash._flash_attention_bwd_dq(*arrays, **tile, **more)
    return d_query, d_key, d_value, d_bias


attention.defvjp(_forward, _backward)


def _finite(bias: Array) -> Array:
    """The bias as the kernel takes it: infinities would meet and make NaN."""
    return jnp.maximum(bias, flash.DEFAULT_MASK_VALUE)


def _mode(how: How):
    # The kernel takes no such argument. `True` stands for the plain program, not the simulated device.
    return pltpu.force_tpu_interpret_mode(True) if how.interpret else contextlib.nullcontext()  # type: ignore[arg-type]
