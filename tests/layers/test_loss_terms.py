import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import loss_terms
from attnlab.layers.linear import logits, scaled
from attnlab.layers.loss_terms import token_loss_terms

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


@pytest.mark.parametrize("count", [2, 3, 11])
def test_chunks_do_not_change_loss_terms(monkeypatch, count):
    """Also if the last chunk has padding."""

    def run(x, table, bias):
        stats = token_loss_terms(x, TARGETS, table, bias, 2.0, "float32")
        return sum(jnp.sum(jnp.sin(a + i)) for i, a in enumerate(stats)), stats

    whole = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(X, TABLE, BIAS)
    monkeypatch.setattr(loss_terms, "_num_chunks", lambda x, table: count)
    parts = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(X, TABLE, BIAS)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "vocab", "expected"),
    [
        (8192, 128_256, 16),  # 8,016 ids each, although they have 2^26 logits
        (8192, 50_257, 7),  # its divisors are 1, 29 and more: the last chunk has padding
        (8192, 32_128, 4),
        (1024, 128_256, 8),
        (1 << 20, 256, 1),
        (64, 257, 1),
    ],
)
def test_number_of_chunks(rows, vocab, expected):
    found = []
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, rows // 2, 4), (vocab, 4))]
    jax.eval_shape(lambda *arrays: found.append(loss_terms._num_chunks(*arrays)), *shapes)
    assert found == [expected]


def test_number_of_chunks_counts_the_rows_and_the_vocabulary_of_a_device(mesh_of):
    with jax.set_mesh(mesh_of("fsdp:2,tensor:4")):
        x = jnp.zeros((8, 4096, 4), out_sharding=jax.P("fsdp"))
        table = jnp.zeros((1 << 17, 4), out_sharding=jax.P("tensor"))
        assert loss_terms._num_chunks(x, table) == (1 << 17) // 4 // loss_terms.MIN_COLUMNS


@pytest.mark.parametrize("mesh", ["data:2,tensor:4", "data:2,sequence:2,tensor:2", "fsdp:2,tensor:4"])
def test_chunks_on_a_mesh_do_not_change_loss_terms(mesh_of, monkeypatch, mesh):
    table, bias = jnp.pad(TABLE, [(0, 1), (0, 0)]), jnp.pad(BIAS, (0, 1))  # 4 devices divide 12

    def loss(x, table, bias):
        stats = token_loss_terms(x, TARGETS, table, bias, None, "float32")
        return jnp.sum(jnp.sin(stats.lse - stats.target_logit) + stats.mean_logit + stats.correct)

    expected = jax.value_and_grad(loss, (0, 1, 2))(X, table, bias)
    monkeypatch.setattr(loss_terms, "_num_chunks", lambda x, table: 2)  # of 3 or 6 ids, one is padding
    with jax.set_mesh(mesh_of(mesh)):
        tables = jax.device_put(table, jax.P("tensor", "fsdp")), jax.device_put(bias, jax.P("tensor"))
        arrays = jax.device_put(X, jax.P(("data", "fsdp"))), *tables
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_table_over_fsdp_is_not_gathered(mesh_of, monkeypatch):
    """The table is gathered once, and no loop returns its gradient as a whole."""
    monkeypatch.setattr(loss_terms, "_num_chunks", lambda x, table: 4)

    def loss(table, x, targets):
        return token_loss_terms(x, targets, table, None, None, "float32").lse.sum()

    def array(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    mesh, rows = mesh_of("fsdp:4,tensor:2"), jax.P(("data", "fsdp", "expert"))
    with jax.set_mesh(mesh):
        arrays = (
            array(jnp.float32, jax.P("tensor", "fsdp"), 64, 16),
            array(jnp.float32, rows, 8, 6, 16),
            array(jnp.int32, rows, 8, 6),
        )
        text = jax.jit(jax.grad(loss)).lower(*arrays).compile().as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1
    loops = [line for line in text.splitlines() if " while(" in line]
    shard, whole = "f32[4,1,8,4]", "f32[4,1,8,16]"  # chunks, parts of the vocabulary, ids, width
    assert any(shard in line for line in loops)
    # The chunks of the table are in both loops; a gradient would be a second such array in one.
    assert all(line.split(" while(")[0].count(whole) == 1 for line in loops)


def test_gradients_of_bfloat16_chunks_are_as_exact_as_of_one_product(monkeypatch):
    """The largest errors of the gradients of activations and table, against float64."""
    t, e, v = 256, 16, 1024
    x = jnp.asarray(RNG.normal(size=(1, t, e)), jnp.bfloat16)
    table = jnp.asarray(RNG.normal(size=(v, e)), jnp.bfloat16)
    targets = jnp.asarray(RNG.integers(0, v, (1, t)))

    def gradients(count):
        def loss(x, table):
            stats = token_loss_terms(x, targets, table, None, None, "float32")
            return jnp.sum(stats.lse - stats.target_logit)

        monkeypatch.setattr(loss_terms, "_num_chunks", lambda x, table: count)
        return [np.asarray(a, np.float64) for a in jax.grad(loss, (0, 1))(x, table)]

    wide = np.asarray(x[0], np.float64), np.asarray(table, np.float64)
    y = wide[0] @ wide[1].T
    d_y = np.exp(y - np.log(np.exp(y).sum(-1, keepdims=True))) - np.eye(v)[np.asarray(targets[0])]
    exact = d_y @ wide[1], d_y.T @ wide[0]
    one, many = ([np.abs(a - b).max() for a, b in zip(gradients(n), exact, strict=True)] for n in (1, 16))
    assert all(0 < a <= 1.05 * b for a, b in zip(many, one, strict=True)), (many, one)


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
    monkeypatch.setattr(loss_terms, "_num_chunks", lambda x, table: 10)
    assert memory() < whole / 2


def test_scale_is_not_rounded_to_bfloat16():
    x = RNG.normal(size=(1, 50, 8)).astype(jnp.bfloat16)
    expected = (x.astype(np.float64) * 768**-0.5).astype(jnp.bfloat16)
    np.testing.assert_array_equal(scaled(jnp.asarray(x), 768**-0.5), expected)
