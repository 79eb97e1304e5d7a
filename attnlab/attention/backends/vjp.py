"""Gradients of the arrays within masks and scores, summed over the parts that these were cut to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention.pairwise import Dims
from attnlab.attention.scores import Score


def is_floating(x: Any) -> bool:
    """Whether an array has a gradient."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def row_term(out: Array, d_out: Array, d_lse: Array) -> Array:
    """sum(out * d_out) over the width, less d_lse: what every row's gradient of its weights is less.

    d scores = weights * (d weights - sum(weights * d weights) + d lse), and the sum is out . d out.
    """
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse


def zero_cotangent(tree: Any) -> Any:
    """The cotangent of what no gradient flows to."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x) if is_floating(x) else np.zeros(jnp.shape(x), jax.dtypes.float0), tree
    )


def init(score: Score | None) -> list[Array]:
    """Sums to begin with, one for each array of a score; of integers, which have no gradient, a single 0."""
    return [jnp.zeros(jnp.shape(x) if is_floating(x) else ()) for x in jax.tree.leaves(score)]


def accumulate_block(
    score: Score | None, sums: list[Array], parts: Any, **starts: int | Array
) -> list[Array]:
    """`sums` with the gradient of a cut score added where it was cut from, `cut(queries=(start, length))`."""
    if score is None:
        return sums

    def accumulate(total, part, dims: Dims):
        if part.dtype == jax.dtypes.float0 or (total.shape != part.shape and not total.shape):
            return total
        at = [
            starts.get(name or "", 0) if n < whole else 0
            for name, n, whole in zip(dims, part.shape, total.shape, strict=True)
        ]
        current = jax.lax.dynamic_slice(total, at, part.shape)
        return jax.lax.dynamic_update_slice(total, current + part, at)

    leaf_dims = jax.tree.leaves(score.map_arrays(lambda x, dims: _DimsLeaf(dims)))
    return [
        accumulate(total, part, leaf.dims)
        for total, part, leaf in zip(sums, jax.tree.leaves(parts), leaf_dims, strict=True)
    ]


def finalize(score: Score | None, sums: list[Array]) -> Any:
    """The sums as the cotangent of a score, whose arrays may have been made longer since."""
    leaves = jax.tree.leaves(score)

    def to_cotangent(x, total):
        if not is_floating(x):
            return zero_cotangent(x)
        return jax.lax.slice(total, (0,) * x.ndim, x.shape).astype(x.dtype)

    return jax.tree.unflatten(jax.tree.structure(score), list(map(to_cotangent, leaves, sums)))


class _DimsLeaf:
    """The dims where a tree has an array."""

    def __init__(self, dims: Dims):
        self.dims = dims
