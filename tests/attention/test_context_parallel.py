"""Attention over a sharded length: results against the reference, and the collectives used."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import (
    attend,
    bias,
    causal,
    explain,
    mask_fn,
    normalizers,
    score_fn,
    segments,
    softcap,
    window,
)
from attnlab.attention.block_mask import make_block_mask
from attnlab.attention.masks.base import BlockGrid
from tests.attention.inputs import qkv, weighted_sum
from tests.selection import long

BACKENDS = ["ring", "all_to_all", "all_gather"]
B, T, H, K = 2, 48, 8, 4
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), axis=1))
SLOPES = jnp.linspace(0.1, 0.8, H)
CASES = {
    "no mask": (None, None, None),
    "causal": (causal(), None, None),
    "window, softcap, sinks": (causal() & window(9), softcap(3.0), jnp.linspace(-1, 1, H)),
    "segments, bias": (
        causal() & segments(IDS),
        bias(0.01 * jnp.arange(H * T * T).reshape(H, T, T) % 7),
        None,
    ),
    "user-defined mask and score": (
        mask_fn(lambda b, h, q, k: (IDS[b, q] == IDS[b, k]) & (q >= k) & ((h != 1) | (q - k < 3))),
        score_fn(lambda s, b, h, q, k: s - SLOPES[h] * (q - k)),
        jnp.linspace(-1, 1, H),
    ),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)


def placed(mesh, arrays):
    return [jax.device_put(x, jax.NamedSharding(mesh, P("data", "sequence", None, None))) for x in arrays]


def loss_of(backend):
    def loss(query, key, value, score, sinks, mask):
        options = {"mask": mask, "score": score, "sinks": sinks, "return_lse": True}
        out, lse = attend(query, key, value, backend=backend, **options)
        if not jax.sharding.get_abstract_mesh().empty:
            assert jax.typeof(out).sharding.spec == P("data", "sequence", None, None)
            out, lse = jax.sharding.reshard((out, lse), P())
        return weighted_sum(out, lse), (out, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True, allow_int=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [long("no mask"), long("causal"), *list(CASES)[2:]])
def test_outputs_and_gradients_match_reference(mesh, case, backend):
    mask, score, sinks = CASES[case]
    arrays = qkv(0, b=B, t=T, s=T, h=H, k=K)
    expected = loss_of("reference")(*arrays, score, sinks, mask)
    with jax.set_mesh(mesh):
        got = loss_of(backend)(*placed(mesh, arrays), score, sinks, mask)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if desired.dtype != jax.dtypes.float0:
            desired = np.asarray(desired)
            size = max(1.0, np.abs(desired[np.isfinite(desired)]).max())
            np.testing.assert_allclose(np.asarray(actual), desired, rtol=1e-5, atol=1e-5 * size)


NORMALIZERS = {
    "off_by_one": normalizers.off_by_one,
    "sigmoid": normalizers.sigmoid(8),
    "top_k": normalizers.top_k(3),
    "sparsemax": normalizers.sparsemax,
    "entmax15": normalizers.entmax15,
}


@pytest.mark.parametrize(
    "backend, name", [*(("all_gather", name) for name in NORMALIZERS), ("all_to_all", "entmax15")]
)
def test_normalizers_equal_those_of_one_device_in_float64(mesh, backend, name):
    """With segments, a bias of every pair, and one of each query, whose gradients stay sharded."""
    t, h = 16, 4
    rng = np.random.default_rng(0)

    def loss(query, key, value, pairs, rows, backend):
        out, lse = attend(
            *(query, key, value),
            mask=causal() & segments(IDS[:, :t]),
            score=[bias(pairs), bias(rows)],
            sinks=jnp.linspace(-1, 1, h),
            normalizer=NORMALIZERS[name],
            return_lse=True,
            backend=backend,
        )
        if not jax.sharding.get_abstract_mesh().empty:
            out, lse = jax.sharding.reshard((out, lse), P())
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(weights * out) + jnp.sum(jnp.sin(jnp.where(jnp.isneginf(lse), 0, lse)))

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)), static_argnums=5)
    with jax.enable_x64(True):
        arrays = qkv(0, b=B, t=t, s=t, h=h, k=h, dtype=jnp.float64)
        biases = [jnp.asarray(rng.normal(size=shape)) for shape in [(h, t, t), (B, 1, t, 1)]]
        expected = gradients(*arrays, *biases, "reference")
        with jax.set_mesh(mesh):
            got = gradients(*placed(mesh, arrays), *biases, backend)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=0, atol=1e-8)


def test_another_normalizer_selects_a_backend_with_all_keys(mesh, refuses):
    shape = jax.ShapeDtypeStruct(
        (B, T, H, 6), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "sequence"))
    )
    with jax.set_mesh(mesh):
        for k, backend in ((4, "all_to_all"), (2, "all_gather")):
            keys = shape.update(shape=(B, T, k, 6))
            text = str(explain(shape, keys, keys, normalizer=normalizers.sparsemax))
            assert text.splitlines()[0] == f"backend   {backend} (reference)"
        with refuses("'ring' does not support", "only the softmax"):
            attend(*placed(mesh, qkv(0, b=B, t=T, s=T)), normalizer=normalizers.sparsemax, backend="ring")


@pytest.mark.parametrize("backend", BACKENDS)
def test_collectives(mesh, backend):
    shape = jax.ShapeDtypeStruct(
        (B, T, H, 6), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "sequence"))
    )

    def loss(q, k, v):
        return attend(q, k, v, mask=causal(), backend=backend).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile().as_text()
    names = "collective-permute|all-gather|all-to-all|all-reduce|reduce-scatter"
    collectives = set(re.findall(rf"= \S+ ({names})(?:-start)?\(", text)) | set(
        re.findall(rf"\) ({names})(?:-start)?\(", text)
    )
    allowed = {
        "ring": {"collective-permute"},
        "all_to_all": {"all-to-all"},
        # XLA:CPU lowers reduce-scatter to all-reduce.
        "all_gather": {"all-gather", "reduce-scatter", "all-reduce"},
    }[backend]
    assert collectives and collectives <= allowed, collectives


def test_zigzag_gives_every_device_the_same_work():
    """Count the nonempty blocks of a causal mask on each of 8 devices, over all ring steps."""
    n, length = 8, 8 * 256
    part = length // (2 * n)

    def blocks_of(device):
        parts = device, 2 * n - 1 - device
        grids = [
            BlockGrid(part, part, 16, 16, offset=(0, 0, i * part, j * part))
            for i in parts
            for j in range(2 * n)
        ]
        return sum(make_block_mask(causal(), grid).num_visits for grid in grids)

    work = [blocks_of(device) for device in range(n)]
    assert max(work) <= 1.01 * min(work)
    total = make_block_mask(causal(), BlockGrid(length, length, 16, 16)).num_visits
    assert sum(work) == total


def test_unsupported_calls_are_rejected(mesh, refuses):
    arrays = qkv(0, b=B, t=T, s=T, h=H, k=2)
    odd = qkv(0, b=B, t=12, s=12, h=H, k=K)
    with jax.set_mesh(mesh):
        with refuses("'all_to_all' does not support", "2 key heads", "4 devices"):
            attend(*placed(mesh, arrays), backend="all_to_all")
        with refuses("'ring' does not support", "not even"):
            attend(*placed(mesh, odd), mask=causal(), backend="ring")
        with refuses("'blockwise' does not support", "the length is sharded over sequence"):
            attend(*placed(mesh, arrays), backend="blockwise")
        with refuses("no backend supports", "reference: the length is sharded"):
            attend(*placed(mesh, arrays), return_weights=True)
    with refuses("'ring' does not support", "the length is not sharded"):
        attend(*arrays, backend="ring")
