"""`flax_attention_fn`: `attend` as the `attention_fn` of Flax's own attention modules."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from attnlab.attention import attend, causal
from attnlab.attention import bias as bias_score
from attnlab.attention.backends.registry import Backend
from attnlab.attention.masks.base import as_mask
from attnlab.errors import InputError


def flax_attention_fn(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
    promote_dtype: Callable | None = None,
    is_causal: bool = False,
    backend: str | Backend = "auto",
) -> Float[Array, "*B T H Dv"]:
    """Compute attention by `attend`, with the arguments of Flax's `dot_product_attention`.

    Pass it as `attention_fn` to `nn.MultiHeadDotProductAttention` or `nnx.MultiHeadAttention`. A
    query without keys gets output 0; Flax returns the mean of all values.

    Args:
      query: (*B, T, H, D), with any number of batch dimensions, also none.
      key: (*B, S, K, D).
      value: (*B, S, K, Dv).
      bias: added to the scores; broadcasts to (*B, H, T, S).
      mask: nonzero where a query attends to a key, as in Flax; broadcasts to (*B, H, T, S).
      broadcast_dropout: whether all batch rows and heads drop the same pairs.
      dropout_rng: random key of the dropout; the same key drops the same pairs as in Flax.
      dropout_rate: fraction of the weights to drop.
      deterministic: True for no dropout.
      dtype: dtype of the computation; None promotes those of the arrays.
      precision: precision of the matrix products of the forward pass, for `jax.lax.Precision`.
      module: the module that sows the weights before dropout as "attention_weights".
      force_fp32_for_softmax: has no effect, since `attend` always computes the softmax in float32.
      einsum_dot_general: not supported, like the next two: `attend` has no einsum to replace.
      qk_attn_weights_einsum: not supported.
      attn_weights_value_einsum: not supported.
      promote_dtype: function of ((query, key, value), dtype) that replaces the promotion.
      is_causal: whether query i attends only to keys up to i.
      backend: as in `attend`.

    Raises:
      InputError: `attend` rejects the arguments, or an einsum is replaced.
    """
    if einsum_dot_general or qk_attn_weights_einsum or attn_weights_value_einsum:
        raise InputError("flax_attention_fn: attend has no einsum to replace, as for quantized products")
    query, key, value = (promote_dtype or _promote_dtype)((query, key, value), dtype=dtype)
    with _matmul_precision(precision):
        out = attend(
            *(query, key, value),
            mask=_mask(mask, is_causal, query.shape[:-3]),
            score=_score(bias, query.shape[:-3]),
            **_dropout(query, key, dropout_rng, dropout_rate, broadcast_dropout, bool(deterministic)),
            backend=backend,
            return_weights=module is not None,
        )
    if module is None:
        return out
    out, weights = out
    _sow(module, weights.astype(query.dtype))
    return out


def _promote_dtype(arrays: tuple[Array, ...], dtype: Any) -> list[Array]:
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.promote_types(dtype, jnp.float32)
    return [jnp.asarray(x, dtype) for x in arrays]


def _mask(mask: Array | None, is_causal: bool, batch: tuple[int, ...]):
    if mask is None:
        return causal() if is_causal else None
    mask = flatten_batch(jnp.asarray(mask) != 0, batch)
    return causal() & as_mask(mask) if is_causal else mask


def _score(array: Array | None, batch: tuple[int, ...]):
    if array is None:
        return None
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    return bias_score(flatten_batch(array, batch))


def _dropout(query, key, rng: Array | None, rate: float, broadcast: bool, deterministic: bool) -> dict:
    """Return the arguments of `attend` that drop the same pairs as Flax's dropout."""
    options = {"dropout_rate": rate, "deterministic": deterministic}
    if deterministic or rng is None or not rate > 0:
        return options
    batch, rows = query.shape[:-3], (*query.shape[:-3], query.shape[-2])
    lengths = query.shape[-3], key.shape[-3]
    keep = jax.random.bernoulli(rng, 1 - rate, (*((1,) * len(rows) if broadcast else rows), *lengths))
    return options | {"dropout_mask": flatten_batch(keep if batch else keep[None], batch)}


def flatten_batch(x: Array, batch: tuple[int, ...]) -> Array:
    """Reshape an array that broadcasts to (*batch, H, T, S) to broadcast to (B, H, T, S)."""
    if len(batch) < 2 or x.ndim <= 3:
        return x
    rows, scores = x.shape[:-3], x.shape[-3:]
    if all(n == 1 for n in rows):
        return x.reshape(1, *scores)
    return jnp.broadcast_to(x, (*batch, *scores)).reshape(-1, *scores)


def _matmul_precision(precision: Any):
    """Return a context in which matrix products have this precision."""
    if precision is None:
        return contextlib.nullcontext()
    precisions = set(precision) if isinstance(precision, tuple) else {precision}
    if len(precisions) > 1:
        raise InputError(f"flax_attention_fn: both operands need the same precision, not {precision}")
    (one,) = precisions
    if isinstance(one, jax.lax.Precision):
        one = one.name.lower()
    return jax.default_matmul_precision(getattr(one, "name", one))


def _sow(module: Any, weights: Array) -> None:
    """Sow the weights as Flax's function does, in a module of Linen or of NNX."""
    if isinstance(module, nn.Module):
        module.sow("intermediates", "attention_weights", weights)
    else:
        from flax import nnx

        module.sow(nnx.Intermediate, "attention_weights", weights)
