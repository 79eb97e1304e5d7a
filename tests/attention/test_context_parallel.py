"""Attention over a sharded sequence: each way equals the reference, and moves what it should and no more."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, bias, causal, mask_fn, score_fn, segments, softcap, window
from attnlab.attention.block_mask import make_block_mask
from attnlab.attention.masks.base import BlockGrid
from tests.attention.inputs import qkv, weighted_sum

WAYS = ["ring", "all_to_all", "all_gather"]
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
    "a mask and a score of the user": (
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_with_all_gradients(mesh, case, way):
    mask, score, sinks = CASES[case]
    arrays = qkv(0, b=B, t=T, s=T, h=H, k=K)
    expected = loss_of("reference")(*arrays, score, sinks, mask)
    with jax.set_mesh(mesh):
        got = loss_of(way)(*placed(mesh, arrays), score, sinks, mask)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if theirs.dtype != jax.dtypes.float0:
            theirs = np.asarray(theirs)
            size = max(1.0, np.abs(theirs[np.isfinite(theirs)]).max())
            np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("way", WAYS)
def test_collectives(mesh, way):
    shape = jax.ShapeDtypeStruct(
        (B, T, H, 6), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "sequence"))
    )

    def loss(q, k, v):
        return attend(q, k, v, mask=causal(), backend=way).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile().as_text()
    kinds = "collective-permute|all-gather|all-to-all|all-reduce|reduce-scatter"
    found = set(re.findall(rf"= \S+ ({kinds})(?:-start)?\(", text)) | set(
        re.findall(rf"\) ({kinds})(?:-start)?\(", text)
    )
    allowed = {
        "ring": {"collective-permute"},
        "all_to_all": {"all-to-all"},
        "all_gather": {"all-gather", "reduce-scatter", "all-reduce"},  # on CPUs a scatter is a reduction
    }[way]
    assert found and found <= allowed, found


def test_the_zig_zag_deals_every_device_the_same_work():
    """Tiles that a causal mask leaves each of 8 devices, over all that meet there."""
    n, length = 8, 8 * 256
    part = length // (2 * n)

    def tiles_of(device):
        mine = device, 2 * n - 1 - device
        grids = [
            BlockGrid(part, part, 16, 16, offset=(0, 0, i * part, j * part))
            for i in mine
            for j in range(2 * n)
        ]
        return sum(int(make_block_mask(causal(), grid)[0].kv_num_blocks.sum()) for grid in grids)

    work = [tiles_of(device) for device in range(n)]
    assert max(work) <= 1.01 * min(work)
    whole = int(make_block_mask(causal(), BlockGrid(length, length, 16, 16))[0].kv_num_blocks.sum())
    assert sum(work) == whole


def test_refusals(mesh, refuses):
    arrays = qkv(0, b=B, t=T, s=T, h=H, k=2)
    odd = qkv(0, b=B, t=12, s=12, h=H, k=K)
    with jax.set_mesh(mesh):
        with refuses("'all_to_all' cannot do this", "2 key heads", "4 devices"):
            attend(*placed(mesh, arrays), backend="all_to_all")
        with refuses("'ring' cannot do this", "not even"):
            attend(*placed(mesh, odd), mask=causal(), backend="ring")
        with refuses("'blockwise' cannot do this", "the length is sharded over sequence"):
            attend(*placed(mesh, arrays), backend="blockwise")
        with refuses("no backend can do this", "reference: the length is sharded"):
            attend(*placed(mesh, arrays), return_weights=True)
    with refuses("'ring' cannot do this", "whole on every device"):
        attend(*arrays, backend="ring")
