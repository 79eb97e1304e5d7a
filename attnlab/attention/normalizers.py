"""From masked scores to weights: functions for `attend(..., normalizer=)`.

Each takes scores, -inf where forbidden, and gives weights over the last axis and what takes the place of
the log-sum-exp. A row of -inf gives weights 0 and gradient 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.errors import InputError

__all__ = ["entmax15", "off_by_one", "sigmoid", "softmax", "sparsemax", "top_k"]

Weights = tuple[Float[Array, "*b S"], Float[Array, "*b"]]


def softmax(scores: Float[Array, "*b S"]) -> Weights:
    """Weights and log-sum-exp over the last axis; a row of -inf gives weights 0 and -inf, with gradient 0."""
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    exponentials = jnp.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return exponentials / total, lse[..., 0]


def off_by_one(scores: Float[Array, "*b S"]) -> Weights:
    """exp(s_i) / (1 + sum_j exp(s_j)), and log(1 + sum_j exp(s_j)); a sink of 0 (Miller 2023, "Attention Is
    Off By One").
    """
    weights, lse = softmax(scores)
    return weights * jax.nn.sigmoid(lse)[..., None], jax.nn.softplus(lse)


def sigmoid(length: int) -> Callable[[Float[Array, "*b S"]], Weights]:
    """The normalizer sigmoid(s_i - log n), each key for itself in a sequence of `length` n; beside the
    weights the log of their sum (Ramapuram et al. 2024, arXiv 2409.04431).

    Raises:
      InputError: a length that is not positive.
    """
    if length < 1:
        raise InputError(f"sigmoid: length must be at least 1, not {length}")

    def normalizer(scores: Float[Array, "*b S"]) -> Weights:
        weights = jax.nn.sigmoid(scores - math.log(length))
        total = weights.sum(axis=-1)
        return weights, jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)))

    return normalizer


def top_k(k: int) -> Callable[[Float[Array, "*b S"]], Weights]:
    """The normalizer softmax over the k highest scores of a row and those equal to the k-th, with their
    log-sum-exp (Zhao et al. 2019, arXiv 1912.11637).

    Raises:
      InputError: k is not positive.
    """
    if k < 1:
        raise InputError(f"top_k: k must be at least 1, not {k}")

    def normalizer(scores: Float[Array, "*b S"]) -> Weights:
        kth = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][..., -1:]
        return softmax(jnp.where(scores >= kth, scores, -jnp.inf))

    return normalizer


def sparsemax(scores: Float[Array, "*b S"]) -> Weights:
    """max(s_i - tau, 0), the point of the simplex nearest to the scores, and its threshold tau (Martins and
    Astudillo 2016, arXiv 1602.02068, algorithm 1).
    """
    return _above_threshold(scores, lambda total, squares, count: (total - 1) / count)


def entmax15(scores: Float[Array, "*b S"]) -> Weights:
    """max(s_i / 2 - tau, 0)^2 that sum to 1, and tau: sparse, between softmax and sparsemax (Peters et al.
    2019, arXiv 1905.05702, algorithm 2).
    """

    def threshold(total, squares, count):
        # The lower root of sum (x - tau)^2 = 1; that there is one is known of the true support alone.
        mean = total / count
        return mean - jnp.sqrt(jnp.maximum((1 - squares) / count + mean**2, 0))

    distance, tau = _above_threshold(scores / 2, threshold)
    return distance**2, tau


def _above_threshold(x: Array, threshold: Callable) -> Weights:
    """max(x - tau, 0) and tau = threshold(sum, sum of squares, count) of the x above tau; -inf where none is.

    A number counts where it exceeds the threshold of itself and the greater ones. That threshold is at
    most 1 below the greatest number.
    """
    top = jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    x = x - top
    ranked = -jnp.sort(-jax.lax.stop_gradient(jnp.maximum(x, -2)), axis=-1)
    sizes = jnp.cumsum(jnp.ones_like(ranked), axis=-1)
    taus = threshold(jnp.cumsum(ranked, axis=-1), jnp.cumsum(ranked**2, axis=-1), sizes)
    last = (taus < ranked).sum(axis=-1, keepdims=True) - 1
    support = x > jnp.take_along_axis(taus, last, axis=-1)
    # Once more, over the support alone, for a gradient that does not pass through the sorting.
    inside = jnp.where(support, x, 0)
    count = jnp.maximum(support.sum(axis=-1, keepdims=True), 1)
    tau = threshold(inside.sum(axis=-1, keepdims=True), (inside**2).sum(axis=-1, keepdims=True), count)
    empty = ~support.any(axis=-1, keepdims=True)
    return jnp.where(support, inside - tau, 0), jnp.where(empty, -jnp.inf, top + tau)[..., 0]
