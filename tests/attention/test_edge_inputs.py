"""On every backend: empty arrays, NaN in masked positions; on the reference, symbolic lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from attnlab.attention import (
    attend,
    bias,
    causal,
    key_lengths,
    mask_fn,
    per_head,
    segments,
    shift_mask,
    softcap,
    window,
)
from attnlab.attention.backends.flash import Flash
from attnlab.attention.backends.splash import Splash
from attnlab.attention.backends.tokamax import Tokamax
from attnlab.attention.normalizers import entmax15, off_by_one, sigmoid, sparsemax, top_k
from tests.attention.inputs import qkv, weighted_sum

SIZES = {"b": 2, "t": 5, "s": 7, "h": 4, "k": 2, "d": 6, "dv": 3}
BACKENDS = (
    "reference",
    "blockwise",
    "blockwise_autodiff",
    "decode",
    Splash(interpret=True),
    Flash(interpret=True),
)


def name_of(backend):
    return backend if isinstance(backend, str) else backend.name


# Empty arrays


@pytest.mark.parametrize("empty", [{"t": 0}, {"s": 0}, {"b": 0}, {"h": 0, "k": 0}])
@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_empty_arrays(backend, empty):
    if backend == "decode":
        if empty == {"t": 0}:
            pytest.skip("decode has one query per row")
        empty = empty | {"t": 1}
    sizes = SIZES | empty
    arrays = qkv(0, **sizes)
    b, t, h, s = (sizes[name] for name in "bths")
    mask = causal() & key_lengths(jnp.full(b, 3)) & segments(jnp.ones((b, t), int), jnp.ones((b, s), int))
    out, lse = attend(*arrays, mask=mask, backend=backend, return_lse=True)
    np.testing.assert_array_equal(out, np.zeros((b, t, h, 3)))
    np.testing.assert_array_equal(lse, np.full((b, t, h), -np.inf))
    assert out.dtype == lse.dtype == jnp.float32

    def loss(*arrays):
        return weighted_sum(*attend(*arrays, mask=mask, backend=backend, return_lse=True))

    for x, gradient in zip(arrays, jax.grad(loss, (0, 1, 2))(*arrays), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(x.shape))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_rows_without_any_key_attend_to_the_sinks(backend):
    arrays, sinks = qkv(0, s=0), jnp.arange(4.0)
    out, lse = attend(*arrays, sinks=sinks, backend=backend, return_lse=True)
    np.testing.assert_array_equal(out, np.zeros((2, 5, 4, 3)))
    np.testing.assert_allclose(lse, np.broadcast_to(sinks, (2, 5, 4)), rtol=1e-6)
    gradient = jax.grad(lambda x: attend(*arrays, sinks=x, backend=backend, return_lse=True)[1].sum())(sinks)
    np.testing.assert_allclose(gradient, np.full(4, 10.0), rtol=1e-6)


@pytest.mark.parametrize("normalizer", [off_by_one, sigmoid(4), sparsemax, entmax15, top_k(2)])
def test_every_normalizer_supports_no_keys(normalizer):
    out, weights = attend(*qkv(0, s=0), normalizer=normalizer, return_weights=True)
    np.testing.assert_array_equal(out, np.zeros((2, 5, 4, 3)))
    assert weights.shape == (2, 4, 5, 0)


def test_empty_arrays_with_dropout_bias_and_more_batch_dimensions():
    query, key, value = (x[None] for x in qkv(0, t=0))
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0), "score": bias(jnp.zeros((4, 0, 7)))}
    out, weights = attend(query, key, value, return_weights=True, **options)
    assert out.shape == (1, 2, 0, 4, 3) and weights.shape == (1, 2, 4, 0, 7)


def test_head_dim_of_0_is_rejected(refuses, unchecked):
    with refuses("head_dim must be at least 1"):
        attend(*qkv(0, d=0))


# NaN in masked positions


def loop(query, key, value, allowed, cap=None):
    """Return out, lse and the gradients of `weighted_sum`, row by row, in float64."""
    (b, t, h, d), (s, k) = query.shape, key.shape[1:3]
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out, lse = np.zeros((b, t, h, value.shape[-1])), np.full((b, t, h), -np.inf)
    d_out = np.cos(np.arange(out.size, dtype=np.float64)).reshape(out.shape)
    d_lse = np.sin(np.arange(lse.size, dtype=np.float64)).reshape(lse.shape)
    gradients = [np.zeros_like(x) for x in (query, key, value)]
    for row, i, head in np.ndindex(b, t, h):
        keys, kv = np.flatnonzero(np.broadcast_to(allowed, (b, h, t, s))[row, head, i]), head // (h // k)
        if not len(keys):
            continue
        ks, vs, q, g = key[row, keys, kv], value[row, keys, kv], query[row, i, head], d_out[row, i, head]
        raw = ks @ q / np.sqrt(d)
        scores = raw if cap is None else cap * np.tanh(raw / cap)
        lse[row, i, head] = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
        p = np.exp(scores - lse[row, i, head])
        out[row, i, head] = p @ vs
        d_scores = p * (vs @ g - out[row, i, head] @ g + d_lse[row, i, head])
        d_raw = d_scores * (1 if cap is None else 1 - (scores / cap) ** 2) / np.sqrt(d)
        gradients[0][row, i, head] = d_raw @ ks
        gradients[1][row, keys, kv] += np.outer(d_raw, q)
        gradients[2][row, keys, kv] += np.outer(p, g)
    return out, lse, gradients


def check_masked_positions(mask, arrays, backend, bad, score=None, cap=None, tolerance=2e-5, static=False):
    """Compare a backend with `loop`, with `bad` in all queries, keys and values that are masked.

    A static mask is closed over; another one is an argument of the program.
    """
    (b, t, h, _), (s, k) = arrays[0].shape, arrays[1].shape[1:3]
    allowed = np.broadcast_to(np.asarray(mask.materialize(t, s, b, h)), (b, h, t, s))
    masked = (
        ~np.swapaxes(allowed.any(3), 1, 2),
        ~np.swapaxes(allowed.any(2).reshape(b, k, -1, s).any(2), 1, 2),
    )
    assert masked[1].any()
    query, key, value = (
        jnp.where(where[..., None], bad, x)
        for where, x in zip((masked[0], masked[1], masked[1]), arrays, strict=True)
    )

    @jax.jit
    def run(query, key, value, traced):
        mask_ = mask if static else traced

        def loss(query, key, value):
            out, lse = attend(query, key, value, mask=mask_, score=score, backend=backend, return_lse=True)
            return weighted_sum(out, lse), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    (_, (out, lse)), gradients = run(query, key, value, mask)
    expected_out, expected_lse, expected_gradients = loop(query, key, value, allowed, cap)
    np.testing.assert_allclose(out, expected_out, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, atol=tolerance)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=tolerance)


IDS = jnp.array([[1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 3, 1, 0]])
PADDED = jnp.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
MASKS = {
    "key lengths": lambda: key_lengths(jnp.array([4, 6]), jnp.array([3, 5])),
    "segments": lambda: segments(IDS[:, :5], IDS),
    "cache": lambda: causal(1),  # slots 6 and later are not filled
    "left padding": lambda: shift_mask(causal(2), jnp.array([2, 4])),
    "array": lambda: np.arange(7)[None, None, None, :] < np.array([4, 5])[:, None, None, None],
    "heads": lambda: per_head([window(0, 0), causal(), window(1, 0), causal()]),
}


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "reference") for name in MASKS), ("left padding", "blockwise"), ("heads", "blockwise")],
)
def test_nan_in_masked_positions_reaches_nothing(backend, name):
    mask = causal(7) & MASKS[name]()  # every pair of causal(7) is allowed
    check_masked_positions(mask, qkv(1), backend, jnp.nan)


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_nan_in_padding_on_every_backend(backend):
    t = 1 if backend == "decode" else 5
    mask = key_lengths(jnp.array([4, 6]), jnp.array([0, 5])) & segments(jnp.ones((2, t), int), PADDED)
    check_masked_positions(mask, qkv(1, t=t), backend, jnp.nan, tolerance=1e-4)


@pytest.mark.parametrize("heads", [{"h": 4, "k": 4}, {"h": 4, "k": 1, "b": 1}])
def test_nan_in_unused_slots_of_one_query(heads):
    mask = per_head([causal(2), causal(4), window(1, 1, 3), window(0, 0, -3)])
    check_masked_positions(mask, qkv(1, t=1, **heads), "decode", jnp.nan, score=softcap(2.0), cap=2.0)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_infinity_in_padding(backend):
    check_masked_positions(segments(IDS[:, :5], IDS), qkv(1), backend, jnp.inf)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "blockwise_autodiff"])
def test_nan_in_masked_positions_with_a_score(backend):
    mask = key_lengths(jnp.array([4, 6]), jnp.array([3, 5]))
    check_masked_positions(mask, qkv(1), backend, jnp.nan, score=softcap(2.0), cap=2.0)


@pytest.mark.parametrize("static", [True, False])
def test_nan_in_masked_positions_of_many_blocks(static):
    lengths = np.array([150, 290])
    ids = np.arange(300)[None] // 70 + 1
    padded = jnp.asarray(np.where(np.arange(300)[None] < lengths[:, None], ids, 0))
    mask = causal() & segments(padded) if static else causal(-10) & key_lengths(200, 190)
    arrays = qkv(2, t=300, s=300, h=2, k=1)
    check_masked_positions(mask, arrays, "blockwise", jnp.nan, tolerance=1e-4, static=static)


def test_nan_in_padding_does_not_reach_static_kernels():
    """A static mask is not materialized: its padding is known from its operands."""
    mask = causal() & key_lengths(6) & segments(PADDED[:, :5], PADDED)
    check_masked_positions(mask, qkv(1), Splash(interpret=True), jnp.nan, tolerance=1e-4, static=True)


def test_nan_in_padding_does_not_reach_tokamax():
    pytest.importorskip("tokamax")
    arrays = qkv(1, d=8, dv=8, dtype=jnp.bfloat16)
    for mask in (causal(), key_lengths(jnp.array([4, 6]))):
        used = np.asarray(mask.materialize(5, 7, 2)).any((1, 2))[..., None, None]
        bad = [arrays[0], *(jnp.where(used, x, jnp.nan) for x in arrays[1:])]
        clean = [arrays[0], *(jnp.where(used, x, 0) for x in arrays[1:])]
        out, expected = (attend(*x, mask=mask, backend=Tokamax("xla")) for x in (bad, clean))
        np.testing.assert_array_equal(out, expected)


def test_nan_under_a_mask_function_and_a_shared_key_head():
    kept = jnp.array([2, 5])
    mask = mask_fn(lambda b, h, q, k: (k < kept[b]) & ((h < 2) | (k != 1)))
    check_masked_positions(mask, qkv(3, h=4, k=1), "reference", jnp.nan)


# Symbolic lengths


def test_export_with_symbolic_batch_and_lengths():
    def run(query, key, value, ids, lengths):
        mask = (causal() | window(1, 1)) & segments(ids[:, : query.shape[1]], ids) & key_lengths(lengths)
        out, lse = attend(query, key, value, mask=mask, score=softcap(5.0), return_lse=True)
        return out, lse

    b, t, s = export.symbolic_shape("b, t, s", constraints=["s >= t"])
    shapes = (b, t, 4, 6), (b, s, 2, 6), (b, s, 2, 3)
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((b, s), (b,))]
    exported = export.export(jax.jit(run))(*floats, *integers)
    for sizes in ({"b": 2, "t": 5, "s": 7}, {"b": 1, "t": 3, "s": 3}):
        arrays = qkv(0, **sizes)
        ids = jnp.ones((sizes["b"], sizes["s"]), jnp.int32).at[:, :2].set(2)
        lengths = jnp.full(sizes["b"], 2, jnp.int32)
        got = exported.call(*arrays, ids, lengths)
        for actual, expected in zip(got, run(*arrays, ids, lengths), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_symbolic_lengths_are_refused_by_other_backends(refuses):
    shape = export.symbolic_shape("2, t, 2, 4")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    with refuses("'blockwise' does not support", "symbolic"):
        export.export(jax.jit(lambda *x: attend(*x, backend="blockwise")))(*arrays)
