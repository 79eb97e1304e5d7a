"""Flash attention with a bias, JAX's older Pallas kernel for TPUs, as a backend.

This module adds rows without keys and a differentiable log-sum-exp to
jax.experimental.pallas.ops.tpu.flash_attention. The mask is passed as part of a dense bias, whose
size `max_bytes` limits. Pallas is imported at the first use of the kernel, since the import takes
half a second.
"""

import contextlib
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import named_output
from attnlab.attention.backends import vjp
from attnlab.attention.backends.reference import MASK_VALUE
from attnlab.attention.backends.registry import AttentionResult, apply_sinks, with_zeroed
from attnlab.attention.backends.tpu_layout import (
    LANES,
    kernel_block_sizes,
    pad_scores,
    round_up,
    to_bhtd,
    tpu_unsupported_reason,
)
from attnlab.attention.masks.basic import normal_form
from attnlab.attention.masks.dense import GIB, format_bytes, materialize_bias, materialize_mask


class Flash:
    """Additive scores with gradients, any mask, and sinks, on TPUs.

    Attributes:
      max_block_size: maximum of block_q and block_kv. None uses 512, which fits the kernel's VMEM.
      interpret: whether to run the kernel in Pallas interpret mode, on any platform.
      max_bytes: maximum size in bytes of the bias that combines score and mask.
    """

    name = "flash"

    def __init__(self, max_block_size: int | None = None, interpret: bool = False, max_bytes: int = GIB):
        self.max_block_size, self.interpret, self.max_bytes = max_block_size, interpret, max_bytes

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if reason := tpu_unsupported_reason(args, self.interpret):
            return reason
        if args.score is not None and not args.score.is_additive:
            return "it supports only additive scores, such as bias and alibi"
        size = 4 * math.prod(args.score_shape)
        if size > self.max_bytes:
            return (
                f"its dense bias would take {format_bytes(size)}; the limit is {format_bytes(self.max_bytes)}"
            )
        return None

    def run(self, args, offset):
        """See `Backend.run`."""
        (_, t, h, _), s = args.query.shape, args.key.shape[1]
        bias = materialize_bias(args.score, args.score_shape, offset)
        if args.mask is not None:
            allowed = materialize_mask(args.mask, args.score_shape, offset)
            bias = jnp.where(allowed, bias, -jnp.inf)
            args = with_zeroed(args, allowed)
        block_sizes = kernel_block_sizes(args, self.max_block_size or 512)
        padded = round_up((t, s), block_sizes)
        query, key, value = to_bhtd(args, padded)
        key, value = (jnp.repeat(x, h // x.shape[1], 1) for x in (key, value))
        width = max(query.shape[-1], value.shape[-1])
        width += -width % LANES if width > LANES else 0
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (query, key, value)
        )
        bias = pad_scores(bias, padded, -jnp.inf)
        right = normal_form(args.mask).right
        is_causal = isinstance(right, int) and right <= 0
        config = KernelConfig(block_sizes, is_causal, self.interpret)
        out, lse = attention(config, query, key, value, bias)
        out, lse = (jnp.swapaxes(x, 1, 2)[:, :t] for x in (out[..., : args.value.shape[-1]], lse))
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


class KernelConfig(NamedTuple):
    """Static options of the kernel.

    Attributes:
      block_sizes: block_q and block_kv.
      causal: whether the bias masks every key after its query, so that such blocks are skipped.
      interpret: whether to run the kernel in Pallas interpret mode, on any platform.
    """

    block_sizes: tuple[int, int]
    causal: bool
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    config: KernelConfig,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B H S D"],
    value: Float[Array, "B H S D"],
    bias: Float[Array, "B H T S"],
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Return output and log-sum-exp.

    Args:
      config: static options.
      query: scaled, (B, H, T, D). T is a multiple of block_q; D is at most 128 or a multiple of it.
      key: (B, H, S, D). S is a multiple of block_kv.
      value: (B, H, S, D).
      bias: added to the scores, (B, H, T, S). -inf masks a pair.
    """
    return _forward(config, query, key, value, bias)[0]


def _forward(config, query, key, value, bias):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, k = config.block_sizes
    empty = (bias <= MASK_VALUE).all(-1)
    with _interpret_mode(config):
        out, total, top = flash._flash_attention_impl(
            *(query, key, value, _finite(bias), None, True, config.causal, 1.0, 1, q, k, k, False)
        )
    out, total, top = named_output(out, total, top)
    out = jnp.where(empty[..., None], 0, out)
    # A row without keys gets sum 1 and maximum 0: masked scores have weight 0 in `_backward`.
    total, top = jnp.where(empty, 1, total), jnp.where(empty, 0, top)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return (out, lse), (query, key, value, bias, out, total, top)


def _backward(config, residuals, d_outputs):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    query, key, value, bias, out, total, top = residuals
    d_out, d_lse = d_outputs
    # JAX's own VJP does not support the log-sum-exp: call its two backward kernels directly.
    delta = vjp.row_term(out, d_out, d_lse)
    arrays = query, key, value, _finite(bias), None, total, top, d_out, delta
    q, k = config.block_sizes
    blocks = {"block_q_major": q, "block_k_major": k, "block_k": k, "causal": config.causal}
    options = {"sm_scale": 1.0, "mask_value": flash.DEFAULT_MASK_VALUE, "debug": False}
    with _interpret_mode(config):
        d_key, d_value = flash._flash_attention_bwd_dkv(*arrays, block_q=q, **blocks, **options)
        d_query, d_bias = flash._flash_attention_bwd_dq(*arrays, **blocks, **options)
    return d_query, d_key, d_value, d_bias


attention.defvjp(_forward, _backward)


def _finite(bias: Array) -> Array:
    """Replace -inf by the kernel's mask value: inf - inf would be NaN."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    return jnp.maximum(bias, flash.DEFAULT_MASK_VALUE)


def _interpret_mode(config: KernelConfig):
    from jax.experimental.pallas import tpu as pltpu

    if not config.interpret:
        return contextlib.nullcontext()
    # The kernel has no `interpret` argument. `True` selects plain JAX, not the simulation of a TPU.
    return pltpu.force_tpu_interpret_mode(True)  # type: ignore[arg-type]
