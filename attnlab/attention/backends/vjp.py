"""Cotangents of the arrays in masks and scores, accumulated over blocks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention.arrays import as_starts, slice_at, wide
from attnlab.attention.pairwise import Dims
from attnlab.attention.scores import Score


def is_floating(x: Any) -> bool:
    """Return whether an array has a floating-point dtype, so that it has a gradient."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def row_term(out: Array, d_out: Array, d_lse: Array) -> Array:
    """Return delta = sum(out * d_out) - d_lse, summed over the head width.

    d scores = weights * (d weights - sum(weights * d weights) + d lse)
             = weights * (d weights - delta), since sum(weights * d weights) = out . d out.
    """
    # A sum over a short dimension takes XLA's CPU backend ten times as long as this product.
    out, d_out = out.astype(wide(out)), d_out.astype(wide(d_out))
    return jnp.einsum("...d,...d->...", out, d_out, precision="highest") - d_lse


def zero_cotangent(tree: Any) -> Any:
    """Return zero cotangents for a pytree: float0 for integers and booleans."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x) if is_floating(x) else np.zeros(jnp.shape(x), jax.dtypes.float0), tree
    )


def init(score: Score | None) -> list[Array]:
    """Return zero sums for the arrays of a score: a scalar for integers, which have no gradient."""
    return [jnp.zeros(jnp.shape(x) if is_floating(x) else ()) for x in jax.tree.leaves(score)]


def add_at(total: Array, part: Array, starts: Sequence) -> Array:
    """Return `total` with `part` added at these starts, integers of any types."""
    sums = slice_at(total, starts, part.shape) + part
    return jax.lax.dynamic_update_slice(total, sums, as_starts(starts))


def accumulate_block(
    score: Score | None, sums: list[Array], parts: Any, **starts: int | Array
) -> list[Array]:
    """Add the gradient of a score's block to `sums`.

    Args:
      score: the whole score.
      sums: the sums from `init`.
      parts: gradient of `score.slice_block(...)`.
      starts: start of the block in each named dimension, for example `queries=64`.
    """
    if score is None:
        return sums

    def accumulate(total, part, dims: Dims):
        if part.dtype == jax.dtypes.float0 or (total.shape != part.shape and not total.shape):
            return total
        at = [
            starts.get(name or "", 0) if n < total_n else 0
            for name, n, total_n in zip(dims, part.shape, total.shape, strict=True)
        ]
        return add_at(total, part, at)

    leaf_dims = jax.tree.leaves(score.map_arrays(lambda x, dims: _DimsLeaf(dims)))
    return [
        accumulate(total, part, leaf.dims)
        for total, part, leaf in zip(sums, jax.tree.leaves(parts), leaf_dims, strict=True)
    ]


def finalize(score: Score | None, sums: list[Array]) -> Any:
    """Return the sums as the cotangent of a score, without the padding that the sums may have."""
    leaves = jax.tree.leaves(score)

    def to_cotangent(x, total):
        if not is_floating(x):
            return zero_cotangent(x)
        return jax.lax.slice(total, (0,) * jnp.ndim(x), jnp.shape(x)).astype(jnp.result_type(x))

    return jax.tree.unflatten(jax.tree.structure(score), list(map(to_cotangent, leaves, sums)))


class _DimsLeaf:
    """A pytree leaf that holds the dims of an array."""

    def __init__(self, dims: Dims):
        self.dims = dims
