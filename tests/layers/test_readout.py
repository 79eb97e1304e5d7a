import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import readout
from attnlab.layers.readout import logits, token_loss_terms

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(11, 4)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=11), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 11, (2, 6)))


@pytest.mark.parametrize("cap", [None, 1.5])
def test_loss_terms_match_logits(cap):
    y = np.asarray(X, np.float64) @ np.asarray(TABLE, np.float64).T + np.asarray(BIAS)
    y = y if cap is None else cap * np.tanh(y / cap)
    np.testing.assert_allclose(logits(X, TABLE, BIAS, cap, "float32"), y, rtol=1e-5, atol=1e-5)
    got = token_loss_terms(X, TARGETS, TABLE, BIAS, cap, "float32")
    target = np.take_along_axis(y, np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.target_logit, target, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.lse, np.log(np.exp(y).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(got.mean_logit, y.mean(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.correct, y.argmax(-1) == TARGETS)
    right = token_loss_terms(X, jnp.asarray(y.argmax(-1)), TABLE, BIAS, cap, "float32")
    assert (right.correct == 1).all()


@pytest.mark.parametrize("max_logits, num_chunks", [(2 * 3 * 11, 2), (2 * 2 * 11 + 1, 3), (1, 6)])
def test_chunks_do_not_change_loss_terms(monkeypatch, max_logits, num_chunks):
    def run(x, table):
        stats = token_loss_terms(x, TARGETS, table, None, 2.0, "float32")
        return sum(jnp.sum(jnp.sin(a + i)) for i, a in enumerate(stats)), stats

    whole = jax.value_and_grad(run, (0, 1), has_aux=True)(X, TABLE)
    monkeypatch.setattr(readout, "MAX_LOGITS", max_logits)
    assert readout._num_chunks(X, 11) == num_chunks
    parts = jax.value_and_grad(run, (0, 1), has_aux=True)(X, TABLE)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_logits_have_logits_dtype():
    x, table = X.astype(jnp.bfloat16), TABLE.astype(jnp.bfloat16)
    exact = jnp.einsum("bte,ve->btv", x.astype(jnp.float32), table.astype(jnp.float32))
    assert logits(x, table, None, None, "bfloat16").dtype == jnp.bfloat16
    got = logits(x, table, None, None, "float32")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)
    assert all(a.dtype == jnp.float32 for a in token_loss_terms(x, TARGETS, table, None, None, "bfloat16"))


def test_loss_terms_do_not_materialise_all_logits(monkeypatch):
    b, t, e, v = 2, 64, 4, 5000
    shapes = (
        jax.ShapeDtypeStruct((b, t, e), jnp.float32),
        jax.ShapeDtypeStruct((v, e), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
    )

    def memory():
        def loss(x, table, targets):
            stats = token_loss_terms(x, targets, table, None, None, "float32")
            return jnp.sum(stats.lse - stats.target_logit)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * b * t * v
    assert memory() >= whole
    monkeypatch.setattr(readout, "MAX_LOGITS", b * 4 * v)
    assert memory() < whole / 2
