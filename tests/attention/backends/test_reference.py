"""Reference attention against a loop over queries in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import attend, causal, reference, segments, softcap
from tests.attention.inputs import SHAPES, allowed_pairs, masks, qkv, weighted_sum


def loop(query, key, value, pairs, scale, cap=None):
    """Compute attention one query at a time, in float64 NumPy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, h, _ = query.shape
    group = h // key.shape[2]
    out = np.zeros((b, t, h, value.shape[-1]))
    lse = np.full((b, t, h), -np.inf)
    weights = np.zeros((b, h, t, key.shape[1]))
    for row, i, head in np.ndindex(b, t, h):
        attended = np.flatnonzero(pairs[row, i])
        if not attended.size:
            continue
        scores = scale * key[row, attended, head // group] @ query[row, i, head]
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        top = scores.max()
        lse[row, i, head] = top + np.log(np.exp(scores - top).sum())
        weights[row, head, i, attended] = np.exp(scores - lse[row, i, head])
        out[row, i, head] = weights[row, head, i, attended] @ value[row, attended, head // group]
    return out, lse, weights


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(SHAPES), st.none() | st.just(1.5))
def test_reference_matches_a_numpy_loop(data, shape, cap):
    mask = data.draw(st.none() | masks(shape["b"], shape["t"], shape["s"]))
    query, key, value = qkv(0, **shape)
    b, t, s = shape["b"], shape["t"], shape["s"]
    pairs = np.ones((b, t, s), bool) if mask is None else allowed_pairs(mask, b, t, s)
    score = None if cap is None else softcap(cap)
    got = reference(query, key, value, mask=mask, score=score, scale=0.3)
    for actual, desired in zip(got, loop(query, key, value, pairs, 0.3, cap), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


def test_rows_without_keys_have_zero_output_and_finite_gradients():
    query, key, value = qkv(1, t=5, s=5)
    mask = causal(-2) & segments(jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))

    def run(q, k, v):
        return reference(q, k, v, mask=mask, score=softcap(2.0), scale=1.0)

    out, lse, weights = run(query, key, value)
    empty = ~mask.materialize(5, 5).any(-1)[:, 0]
    assert empty.sum() == 2 + 4
    assert (out[empty] == 0).all() and (lse[empty] == -jnp.inf).all()
    assert (jnp.swapaxes(weights, 1, 2)[empty] == 0).all()
    assert jnp.isfinite(lse[~empty]).all() and (out[~empty] != 0).all()
    gradients = jax.grad(lambda *a: weighted_sum(*run(*a)[:2]), (0, 1, 2))(query, key, value)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert (gradients[0][empty] == 0).all()


def test_softcap_bounds_the_scores():
    q = jnp.full((1, 1, 1, 1), 100.0)
    key = jnp.array([-100.0, 100.0]).reshape(1, 2, 1, 1)
    *_, weights = reference(q, key, key, mask=None, score=softcap(0.5), scale=1.0)
    np.testing.assert_allclose(weights[0, 0, 0], jax.nn.softmax(jnp.array([-0.5, 0.5])), rtol=1e-6)


def test_dropout_keeps_the_expectation():
    query, key, value = qkv(2)

    def run(dropout_key):
        return attend(query, key, value, dropout_rate=0.4, dropout_key=dropout_key)

    draws = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4000))
    plain = attend(query, key, value)
    error = draws.std(0) / 4000**0.5
    assert (error > 0).all()
    assert (jnp.abs(draws.mean(0) - plain) < 5 * error).all()


def test_dropout_drops_the_given_fraction_of_weights():
    shape = {"b": 1, "t": 40, "s": 50, "h": 2, "k": 2}
    query, key, _ = qkv(3, **shape)
    ones = jnp.broadcast_to(jnp.eye(50)[None, :, None], (1, 50, 2, 50))  # the output equals the weights
    out, weights = attend(
        query, key, ones, dropout_rate=0.3, dropout_key=jax.random.key(1), return_weights=True
    )
    out = jnp.swapaxes(out, 1, 2)
    is_kept = out != 0
    np.testing.assert_allclose(is_kept.mean(), 0.7, atol=0.03)
    np.testing.assert_allclose(out[is_kept], weights[is_kept] / 0.7, rtol=1e-5)


def test_products_have_the_highest_precision():
    arrays = qkv(0, dtype=jnp.bfloat16)

    def loss(*x):
        return attend(*x, mask=causal(), backend="reference").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 5  # one forward, and the gradients of two operands of each product
    for line in products:
        assert "precision = [HIGHEST, HIGHEST]" in line and line.endswith("xf32>")
