from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal
from attnlab.attention.normalizers import entmax15, off_by_one, sigmoid, sparsemax, top_k

S = 9
NORMALIZERS = {
    "off_by_one": off_by_one,
    "sigmoid": sigmoid(S),
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "top_k": top_k(3),
}
QKV = (2, 7, 4, 6), (2, 7, 2, 6), (2, 7, 2, 3)
every_normalizer = pytest.mark.parametrize("name", NORMALIZERS)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def bisect(excess):
    """Return the root of the decreasing function `excess`."""
    low, high = -100.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def by_definition(name, row):
    """Return the weights and the second result for the allowed scores of a row, in float64."""
    if not row.size:
        return row, 0.0 if name == "off_by_one" else -np.inf
    match name:
        case "off_by_one":
            total = 1 + np.exp(row).sum()
            return np.exp(row) / total, np.log(total)
        case "sigmoid":
            weights = 1 / (1 + S * np.exp(-row))
            return weights, np.log(weights.sum())
        case "top_k":
            kept = np.where(row >= np.sort(row)[-min(3, row.size)], np.exp(row), 0)
            return kept / kept.sum(), np.log(kept.sum())
        case "sparsemax":
            tau = bisect(lambda tau: np.maximum(row - tau, 0).sum() - 1)
            return np.maximum(row - tau, 0), tau
        case "entmax15":
            tau = bisect(lambda tau: (np.maximum(row / 2 - tau, 0) ** 2).sum() - 1)
            return np.maximum(row / 2 - tau, 0) ** 2, tau


def rows():
    """Return scores of several scales, some of them masked; the last row is fully masked."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(12, S)) * np.geomspace(0.1, 30, 12)[:, None]
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0] = scores[0, 0] = 0.25  # all equal
    scores[-2] = [-np.inf] * (S - 1) + [-7.0]
    scores[-1] = -np.inf
    return scores


@every_normalizer
def test_matches_definition(name):
    scores = rows()
    weights, norm = map(np.asarray, jax.jit(NORMALIZERS[name])(jnp.asarray(scores, jnp.float32)))
    for row, actual, actual_norm in zip(scores, weights, norm, strict=True):
        allowed = np.isfinite(row)
        desired, desired_norm = by_definition(name, row[allowed])
        assert (actual[~allowed] == 0).all()
        np.testing.assert_allclose(actual[allowed], desired, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(actual_norm, desired_norm, rtol=1e-5, atol=2e-6)


@every_normalizer
def test_gradients_match_finite_differences(name):
    scores = rows()[:-1]
    rng = np.random.default_rng(1)
    along, by_weight, by_norm = (
        rng.normal(size=shape) for shape in (scores.shape, scores.shape, len(scores))
    )

    @jax.jit
    def loss(scores):
        weights, norm = NORMALIZERS[name](scores)
        each = (weights * by_weight).sum(axis=-1) + norm * by_norm
        return each.sum(), each

    with jax.enable_x64():
        gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(scores))
        high, low = (np.asarray(loss(jnp.asarray(scores + d * along))[1]) for d in (1e-6, -1e-6))
    gradient, differences = np.asarray(gradient), (high - low) / 2e-6
    assert (gradient[np.isneginf(scores)] == 0).all()
    skip = 1 if name == "top_k" else 0  # equal scores: a step changes which key is the k-th
    np.testing.assert_allclose((gradient * along).sum(-1)[skip:], differences[skip:], rtol=1e-6, atol=1e-6)


@every_normalizer
def test_masked_row_has_zero_weights_and_gradient(name):
    scores = jnp.full((1, S), -jnp.inf)

    def loss(scores):
        weights, norm = NORMALIZERS[name](scores)
        return weights.sum() + jnp.where(jnp.isneginf(norm), 0, norm).sum(), weights

    gradient, weights = jax.jit(jax.grad(loss, has_aux=True))(scores)
    assert (weights == 0).all() and (gradient == 0).all()


def test_off_by_one_matches_zero_sink():
    query, key, value = normal(0, *QKV)
    mask = causal(-1)  # the first query has no key
    run = partial(attend, mask=mask, return_lse=True)
    actual = jax.jit(partial(run, normalizer=off_by_one))(query, key, value)
    sink = jax.jit(partial(run, sinks=jnp.zeros(4)))(query, key, value)
    for a, b in zip(actual, sink, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalizer", [sparsemax, entmax15])
def test_sparse_weights_sum_to_one(normalizer):
    scores = 4 * np.random.default_rng(2).normal(size=(50, 20))
    weights, _ = jax.jit(normalizer)(jnp.asarray(scores, jnp.float32))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights >= 0).all()
    assert (weights == 0).any(-1).all() and (weights > 0).sum() > 60


def test_sparsemax_is_simplex_projection():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(20, 6))
    weights = np.asarray(jax.jit(sparsemax)(jnp.asarray(scores, jnp.float32))[0], np.float64)
    others = rng.dirichlet(np.full(6, 0.3), size=(2000, 1))
    # w is the projection of s onto a convex set if (v - w) . (s - w) <= 0 for all points v of it.
    assert ((others - weights) * (scores - weights)).sum(-1).max() < 1e-6


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_large_scores_do_not_overflow(name):
    row = np.array([3e4, 3e4 - 0.5, -3e4])
    weights, _ = jax.jit(NORMALIZERS[name])(jnp.asarray(row, jnp.float32))
    expected, _ = by_definition(name, row - 3e4)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_top_k_beyond_row_length_is_softmax():
    scores = jnp.asarray(rows(), jnp.float32)
    weights, _ = jax.jit(top_k(50))(scores)
    np.testing.assert_allclose(weights[:-1], jax.nn.softmax(scores, -1)[:-1], rtol=1e-5)


def test_rejects_non_positive_arguments(refuses):
    with refuses("top_k", "at least 1"):
        top_k(0)
    with refuses("sigmoid", "at least 1"):
        sigmoid(-3)
