"""`prepare` and `attend(block_mask=)`: the same results, with the blocks computed once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, block_mask, causal, per_head, prepare, segments, window
from tests.attention.inputs import qkv, weighted_sum
from tests.attention.test_block_mask import documents
from tests.selection import long

B, T, H, K = 8, 64, 4, 2
IDS = jnp.asarray(documents(B, T, 5))
HEADS = [causal(), window(3), causal(-5), window(9, 2)]


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Loop over lists of each row and head, although the blocks are small and few."""
    monkeypatch.setattr(block_mask, "MIN_SCORES", 1)
    monkeypatch.setattr(block_mask, "FEW_BLOCKS", 0)


def value_and_gradients(backend, with_block_mask):
    def loss(query, key, value, mask):
        options = {"mask": mask, "backend": backend}
        if with_block_mask:
            options["block_mask"] = prepare(query, key, value, **options)
            assert options["block_mask"] is not None
        return weighted_sum(*attend(query, key, value, return_lse=True, **options))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def assert_close(got, expected):
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)


MESHES = {
    "blockwise": ((4, 1, 2), AxisType.Explicit),
    "ring": ((2, 4, 1), AxisType.Explicit),
    "all_gather": ((2, 4, 1), AxisType.Explicit),
    "all_to_all": ((4, 2, 1), AxisType.Explicit),
}


@pytest.mark.parametrize("backend", MESHES)
@pytest.mark.parametrize("name", ["rows and heads", long("rows"), long("causal")])
def test_sharded_results_equal_those_of_reference(backend, name):
    """Each device gets its part of the block mask."""
    shape, kind = MESHES[backend]
    mesh = jax.make_mesh(shape, ("data", "sequence", "tensor"), axis_types=(kind,) * 3)
    mask = {"rows": causal() & segments(IDS), "causal": causal()}.get(name)
    mask = per_head(HEADS) & segments(IDS) if mask is None else mask
    arrays = qkv(0, b=B, t=T, s=T, h=H, k=K)
    expected = value_and_gradients("reference", False)(*arrays, mask)
    sharding = NamedSharding(mesh, P("data", "sequence" if shape[1] > 1 else None, "tensor"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in arrays]
        got = value_and_gradients(backend, True)(*placed, mask)
    assert_close(got, expected)


def test_length_that_blocks_do_not_divide_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    arrays = qkv(0, b=8, t=65, s=65, h=H, k=K)
    expected = value_and_gradients("reference", False)(*arrays, causal())
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]
        assert_close(value_and_gradients("blockwise", True)(*placed, causal()), expected)


def test_each_device_computes_its_part():
    """The lists are sharded like the scores, and equal those of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    arrays, mask = qkv(0, b=B, t=T, s=T, h=H, k=K), causal() & segments(IDS)
    sharding = NamedSharding(mesh, P("data", "sequence"))

    @jax.jit
    def run(query, key, value, mask):
        return prepare(query, key, value, mask=mask)

    with jax.set_mesh(mesh):
        made = run(*(jax.device_put(x, sharding) for x in arrays), mask)
    assert made.kv_indices.sharding.spec[:3] == ("data", None, "sequence")
    grid = block_mask.BlockGrid(T, T, *made.block_sizes, B, H)
    whole = jax.jit(lambda mask: block_mask.make_block_mask(mask, grid))(mask)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = np.asarray(getattr(made, f"{name}_num_blocks"))
        np.testing.assert_array_equal(counts, getattr(whole, f"{name}_num_blocks"))
        indices, expected = (np.asarray(getattr(x, f"{name}_indices")) for x in (made, whole))
        for at in np.ndindex(*counts.shape):
            np.testing.assert_array_equal(indices[at][: counts[at]], expected[at][: counts[at]])


def test_block_masks_pass_through_transformations():
    """A block mask is a pytree: of `jax.jit`, `jax.vmap`, `jax.lax.scan`, `jax.checkpoint`."""
    arrays = qkv(0, b=2, t=40, s=40, h=2, k=1)
    ids = jnp.asarray(documents(6, 40, 4)).reshape(3, 2, 40)

    def make(ids):
        return prepare(*arrays, mask=segments(ids), backend="blockwise")

    def loss(made, ids):
        return weighted_sum(*attend(*arrays, mask=segments(ids), block_mask=made, return_lse=True))

    stacked = jax.vmap(make)(ids)
    assert jax.tree.structure(stacked) == jax.tree.structure(jax.jit(make)(ids[0]))
    expected = [weighted_sum(*attend(*arrays, mask=segments(x), return_lse=True)) for x in ids]
    np.testing.assert_allclose(jax.vmap(loss)(stacked, ids), expected, rtol=1e-4)

    def step(total, x):
        return total + jax.checkpoint(loss)(*x), None

    np.testing.assert_allclose(jax.lax.scan(step, 0.0, (stacked, ids))[0], sum(expected), rtol=1e-4)


def test_static_masks_are_computed_at_trace_time():
    arrays = qkv(0, b=2, t=40, s=40, h=2, k=1)
    run = jax.jit(lambda *x: prepare(*x, mask=causal() & window(9), backend="blockwise").arrays)
    text = run.lower(*arrays).as_text()
    assert not re.search(r"sort|compare|while", text)


def test_backends_without_blocks_get_none():
    arrays = qkv(0, b=2, t=40, s=40, h=2, k=1)
    assert prepare(*arrays, mask=causal(), backend="reference") is None
    made = prepare(*arrays, mask=causal())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    assert jax.tree.structure(prepare(*shapes, mask=causal())) == jax.tree.structure(made)
    got = attend(*arrays, mask=causal(), block_mask=made, backend="reference")
    np.testing.assert_array_equal(got, attend(*arrays, mask=causal(), backend="reference"))


def test_block_masks_that_do_not_fit_are_refused(refuses):
    arrays = qkv(0, b=2, t=200, s=200, h=2, k=1)
    made = prepare(*arrays, mask=segments(jnp.asarray(documents(2, 200, 4))), backend="blockwise")
    with refuses("block_mask is for (200, 200)", "(199, 200)"):
        attend(arrays[0][:, :199], *arrays[1:], block_mask=made)
    with refuses("must be a BlockMask", "3"):
        attend(*arrays, block_mask=3)
    with refuses("(2, 1) rows", "do not divide"):
        attend(*qkv(0, b=3, t=200, s=200, h=2, k=1), block_mask=made)
