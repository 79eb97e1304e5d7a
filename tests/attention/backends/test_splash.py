"""Splash attention in Pallas interpret mode against the reference, and its supported arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import (
    attend,
    bias,
    causal,
    explain,
    key_lengths,
    mask_fn,
    segments,
    softcap,
    window,
)
from attnlab.attention.attend import make_dropout
from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.backends.splash import Splash
from tests.attention import definitions
from tests.attention.inputs import qkv, weighted_sum
from tests.selection import sample

KERNEL = Splash(max_block_size=128, interpret=True)
T, S = 200, 300  # two and three blocks of 128, the last ones padded
SHAPE = {"b": 2, "t": T, "s": S, "h": 4, "k": 2, "d": 16, "dv": 8}
RNG = np.random.default_rng(0)
# Segment ids in random order, with padding (0), and a segment (4) with queries but without keys.
DOCUMENTS = jnp.asarray(RNG.integers(0, 5, (2, T))), jnp.asarray(RNG.integers(0, 4, (2, S)))

MASKS = {
    "none": None,
    "window": causal(50) & window(70, None, 50),
    "rows without keys": causal(-60) & window(None, 9),
    "blocks without keys": causal(-150),
    "no pair": causal(-T),
    "segments": segments(*DOCUMENTS),
    "segments within a conjunction": causal(40) & segments(*DOCUMENTS) & mask_fn(lambda b, h, q, k: k != 3),
    "lengths": causal(40) & key_lengths(jnp.array([150, 0]), jnp.array([180, 200])),
    "lengths and segments": key_lengths(jnp.array([280, 90])) & segments(*DOCUMENTS) & window(70, 9),
    "equal lengths": causal(40) & key_lengths(120),
    "dense": RNG.random((T, S)) < 0.3,
    "differs by head": mask_fn(lambda b, h, q, k: (k <= q) & ((h != 1) | (q - k < 20))),
    "dense per head": RNG.random((4, T, S)) < 0.3,
}


def gradients_of(backend, mask, score=None):
    def loss(query, key, value, sinks):
        out, lse = attend(
            *(query, key, value),
            mask=mask,
            score=score,
            sinks=sinks,
            scale=0.3,
            backend=backend,
            return_lse=True,
        )
        if not jax.sharding.get_abstract_mesh().empty:
            lse, out = jax.sharding.reshard((lse, out), P())
        return weighted_sum(out, lse), (out, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def assert_equal(actual, desired, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        size = max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size)


def assert_agree(arrays, mask, score=None, sinks=None, tolerance=1e-5):
    actual, desired = (
        gradients_of(backend, mask, score)(*arrays, sinks) for backend in (KERNEL, "reference")
    )
    assert_equal(actual, desired, tolerance)


@pytest.mark.parametrize("name", sample(MASKS, every=2))
def test_splash_matches_reference(name):
    assert_agree(qkv(0, **SHAPE), MASKS[name])


def test_softcap_and_sinks():
    assert_agree(qkv(1, **SHAPE), causal(-60), softcap(2.0), jnp.asarray([0.5, -1.0, 3.0, 0.0]))


def test_bfloat16_error_is_at_most_two_roundings():
    # The scaled query and the gradients of the weights are rounded as well (2^-8 each).
    arrays = [(x / 2).astype(jnp.bfloat16) for x in qkv(1, **SHAPE)]
    assert_agree(arrays, causal(50), tolerance=2**-7)


def test_result_does_not_depend_on_block_size():
    """The sizes give two blocks, one block computed in halves, and three blocks."""
    arrays = qkv(2, b=1, t=1000, s=1000, h=1, k=1, d=4, dv=4)
    results = [
        jax.jit(lambda *x, size=size: attend(*x, mask=window(300, 0), backend=Splash(size, interpret=True)))(
            *arrays
        )
        for size in (None, 2048, 384)
    ]
    expected = attend(*arrays, mask=window(300, 0), backend="reference")
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("text", ["data:2,tensor:2", "fsdp:2"])
def test_results_do_not_depend_on_the_mesh(mesh_of, text):
    arrays = qkv(0, b=2, t=T, s=T, h=4, k=2, d=8, dv=8)
    dense, ids = np.tril(RNG.random((T, T)) < 0.9, -1), DOCUMENTS[0]

    def gradients(arrays, ids, sinks, backend):
        # The function and the array are static. The segments are traced and differ between rows.
        mask = causal() & segments(ids) & dense & mask_fn(lambda b, h, q, k: k != 3)
        return gradients_of(backend, mask)(*arrays, sinks)

    sinks = jnp.asarray([0.5, -1.0, 3.0, 0.0])
    expected = jax.jit(gradients, static_argnums=3)(arrays, ids, sinks, "reference")
    mesh = mesh_of(text)
    rows = jax.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, rows)
        got = jax.jit(gradients, static_argnums=3)(placed, ids, sinks, KERNEL)
    assert_equal(got, expected)


def test_arrays_replicated_over_a_mesh(mesh_of):
    arrays = qkv(0, b=1, t=T, s=T, h=2, k=1, d=8, dv=8)
    mask = RNG.random((2, T, T)) < 0.5  # per head; every device has all heads
    expected = attend(*arrays, mask=mask, backend="reference")
    with jax.set_mesh(mesh_of("fsdp:2")):
        got = jax.jit(lambda *x: attend(*x, mask=mask, backend=KERNEL))(*arrays)
    np.testing.assert_allclose(got, expected, atol=1e-5)


ARGS = AttentionArgs(*(jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16),) * 3, platform="tpu")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"platform": "cpu"}, "requires a TPU"),
        ({"sequence_axes": ("sequence",)}, "length is sharded over sequence"),
        ({"dropout": make_dropout(0.1, jax.random.key(0), None, False, False)}, "dropout"),
        ({"return_weights": True}, "weights"),
        ({"normalizer": jax.nn.relu}, "only the softmax"),
        ({"value": jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)}, "bfloat16, float32"),
        ({"query": jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)}, "128 queries"),
        ({"score": bias(jnp.ones((4, 256, 256)))}, "softcap"),
        ({"score": softcap(jnp.float32(3))}, "softcap(number)"),
    ],
)
def test_unsupported_reasons(change, words):
    assert Splash().unsupported_reason(ARGS) is None
    assert words in Splash().unsupported_reason(dataclasses.replace(ARGS, **change))


def test_masks_over_the_memory_limit_are_rejected():
    long = dataclasses.replace(ARGS, **dict.fromkeys(("query", "key", "value"), long_shape()))
    assert Splash().unsupported_reason(long) is None
    by_row = dataclasses.replace(long, mask=mask_fn(lambda b, h, q, k: k < b))
    assert "8.0 GiB" in Splash().unsupported_reason(by_row)
    assert Splash(max_bytes=2**40).unsupported_reason(by_row) is None
    query, key, value = qkv(0, b=1, t=128, s=128, h=1, k=1)
    assert "requires a TPU" in explain(query, key, value).rejected["splash"]


def long_shape():
    return jax.ShapeDtypeStruct((2, 2**15, 4, 64), jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_traced_masks(rows, heads):
    arrays, sinks = qkv(3, **SHAPE), jnp.asarray([0.5, -1.0, 3.0, 0.0])
    allowed = RNG.random((rows, heads, T, S)) < 0.4
    allowed[..., 7, :] = False  # a row without keys
    allowed[..., :128, 128:256] = False  # a block without keys

    def gradients(allowed, backend):
        return gradients_of(backend, segments(*DOCUMENTS) & allowed)(*arrays, sinks)

    run = jax.jit(gradients, static_argnums=1)
    assert_equal(run(jnp.asarray(allowed), KERNEL), run(jnp.asarray(allowed), "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("number, name", sample(enumerate(definitions.CASES), every=3))
def test_every_mask_type(number, name):
    """Every mask of the table; some cases add grouped heads, a softcap or sinks."""
    case, heads = definitions.CASES[name](), definitions.H
    arrays = qkv(
        0, b=definitions.B, t=case.queries, s=definitions.S, h=heads, k=heads if number % 2 else 1, d=4
    )
    sinks = jnp.asarray([0.5, -1.0, 3.0]) if number % 4 == 0 else None
    assert_agree(arrays, case.mask, softcap(2.0) if number % 3 == 0 else None, sinks)
