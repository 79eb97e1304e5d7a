"""Normalizers: functions from masked scores to attention weights, for `attend(..., normalizer=)`.

Each takes scores, with -inf for masked pairs, and returns the weights over the last axis and one
value per row in the role of the log-sum-exp. A row of only -inf gets weights 0 and gradient 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import check_at_least

__all__ = ["entmax15", "off_by_one", "sigmoid", "softmax", "sparsemax", "top_k"]

Weights = tuple[Float[Array, "*b S"], Float[Array, "*b"]]


def softmax(scores: Float[Array, "*b S"]) -> Weights:
    """Return the softmax over the last axis and the log-sum-exp of each row.

    A row of only -inf gets weights 0, log-sum-exp -inf and gradient 0.
    """
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    exponentials = jnp.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return exponentials / total, lse[..., 0]


def off_by_one(scores: Float[Array, "*b S"]) -> Weights:
    """Return exp(s_i) / (1 + sum_j exp(s_j)) and log(1 + sum_j exp(s_j)).

    This is softmax with an additional sink of score 0 (Miller 2023, "Attention Is Off By One").
    """
    weights, lse = softmax(scores)
    return weights * jax.nn.sigmoid(lse)[..., None], jax.nn.softplus(lse)


def sigmoid(length: int) -> Callable[[Float[Array, "*b S"]], Weights]:
    """Return the normalizer sigmoid(s_i - log n) for sequences of `length` n.

    Each key is weighted independently of the others (Ramapuram et al. 2024, arXiv 2409.04431). The
    normalizer's second result is the log of the sum of the weights.

    Raises:
      InputError: `length` is not positive.
    """
    check_at_least(1, "sigmoid: ", length=length)

    return _Sigmoid(length)


@dataclass(frozen=True)
class _Sigmoid:
    # Normalizers with the same parameters are equal, so that they share compiled programs.
    length: int

    def __call__(self, scores: Float[Array, "*b S"]) -> Weights:
        weights = jax.nn.sigmoid(scores - math.log(self.length))
        total = weights.sum(axis=-1)
        return weights, jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)))


def top_k(k: int) -> Callable[[Float[Array, "*b S"]], Weights]:
    """Return the normalizer that applies softmax to the k highest scores of each row.

    Scores equal to the k-th highest are included. The second result is the log-sum-exp of the
    selected scores (Zhao et al. 2019, arXiv 1912.11637).

    Raises:
      InputError: `k` is not positive.
    """
    check_at_least(1, "top_k: ", k=k)

    return _TopK(k)


@dataclass(frozen=True)
class _TopK:
    k: int

    def __call__(self, scores: Float[Array, "*b S"]) -> Weights:
        kth = jax.lax.top_k(scores, min(self.k, scores.shape[-1]))[0][..., -1:]
        return softmax(jnp.where(scores >= kth, scores, -jnp.inf))


def sparsemax(scores: Float[Array, "*b S"]) -> Weights:
    """Return max(s_i - tau, 0), the projection of the scores onto the simplex, and tau.

    (Martins and Astudillo 2016, arXiv 1602.02068, algorithm 1.)
    """
    return _above_threshold(scores, lambda total, squares, count: (total - 1) / count)


def entmax15(scores: Float[Array, "*b S"]) -> Weights:
    """Return max(s_i / 2 - tau, 0)^2, with tau such that the weights sum to 1, and tau.

    1.5-entmax is sparse, between softmax and sparsemax (Peters et al. 2019, arXiv 1905.05702,
    algorithm 2).
    """

    def threshold(total, squares, count):
        # The lower root of sum (x - tau)^2 = 1. Only the true support is guaranteed to have a real
        # root, hence the clipping at 0.
        mean = total / count
        return mean - jnp.sqrt(jnp.maximum((1 - squares) / count + mean**2, 0))

    distance, tau = _above_threshold(scores / 2, threshold)
    return distance**2, tau


def _above_threshold(x: Array, threshold: Callable) -> Weights:
    """Return max(x - tau, 0) and tau = threshold(sum, sum of squares, count) of the x above tau.

    An entry belongs to the support if it exceeds the threshold computed from itself and all
    greater entries. tau is at least the greatest entry minus 1. A row of only -inf has tau = -inf.
    """
    top = jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    x = x - top
    ranked = -jnp.sort(-jax.lax.stop_gradient(jnp.maximum(x, -2)), axis=-1)
    sizes = jnp.cumsum(jnp.ones_like(ranked), axis=-1)
    taus = threshold(jnp.cumsum(ranked, axis=-1), jnp.cumsum(ranked**2, axis=-1), sizes)
    last = (taus < ranked).sum(axis=-1, keepdims=True) - 1
    support = x > jnp.take_along_axis(taus, last, axis=-1)
    # Compute tau again from the support, so that the gradient does not pass through the sort.
    inside = jnp.where(support, x, 0)
    count = jnp.maximum(support.sum(axis=-1, keepdims=True), 1)
    tau = threshold(inside.sum(axis=-1, keepdims=True), (inside**2).sum(axis=-1, keepdims=True), count)
    empty = ~support.any(axis=-1, keepdims=True)
    return jnp.where(support, inside - tau, 0), jnp.where(empty, -jnp.inf, top + tau)[..., 0]
