"""`attend` where the types do not show the sharding: Auto meshes and a user's `jax.shard_map`."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.attention import alibi, attend, causal, score_fn, segments, window
from attnlab.attention.backends.flash import Flash
from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.backends.splash import Splash
from attnlab.attention.mixers import gated_linear_attention
from tests.attention.inputs import qkv, weighted_sum

SPEC = P("data", None, "tensor", None)


def make_mesh(*axis_types):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axis_types)


@pytest.mark.parametrize(
    "backend, is_set",
    [
        *(("reference", True), ("blockwise", True), ("blockwise_autodiff", True), ("decode", True)),
        ("blockwise", False),  # the mesh is only that of the arrays
    ],
)
def test_auto_mesh_divides_the_work_and_gathers_nothing(backend, is_set):
    mesh = make_mesh(AxisType.Auto, AxisType.Auto)
    t, s, ids = (1 if backend == "decode" else 64), 64, jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def loss(query, key, value, ids):
        mask = causal(s - t) if t == 1 else causal() & segments(ids)
        out = attend(query, key, value, mask=mask, score=alibi(8), backend=backend)
        return (out**2).sum(), out

    def flops(placed):
        def shape(n, heads):
            sharding = NamedSharding(mesh, SPEC) if placed else None
            return jax.ShapeDtypeStruct((8, n, heads, 16), jnp.float32, sharding=sharding)

        context = jax.set_mesh(mesh) if placed and is_set else contextlib.nullcontext()
        with context:
            run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
            compiled = run.lower(shape(t, 8), shape(s, 4), shape(s, 4), ids).compile()
        return compiled.cost_analysis()["flops"], compiled

    whole, _ = flops(placed=False)
    shard, compiled = flops(placed=True)
    assert shard < 1.1 * whole / 8
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    (_, out), grads = compiled.output_shardings
    for sharding in (out, *grads):
        assert sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)


def test_auto_mesh_gives_the_results_of_one_device():
    mesh, arrays = make_mesh(AxisType.Auto, AxisType.Auto), qkv(0, b=4, t=9, s=9, h=4, k=2)
    placed = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in arrays]
    with jax.set_mesh(mesh):
        got = attend(*placed, mask=causal() & window(3), backend="blockwise")
    expected = attend(*arrays, mask=causal() & window(3), backend="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_mesh_with_explicit_and_auto_axes():
    """The types show the Explicit axis; over the Auto axis the compiler keeps the sharding."""
    mesh, arrays = make_mesh(AxisType.Explicit, AxisType.Auto), qkv(0, b=4, t=9, s=9, h=4, k=2)
    placed = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in arrays]
    ids = jnp.sort(jnp.arange(36).reshape(4, 9) % 3 + 1, axis=1)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *x: attend(*x[:3], mask=causal() & segments(x[3]), backend="blockwise"))
        compiled = run.lower(*placed, ids).compile()
        got = compiled(*placed, ids)
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    expected = attend(*arrays, mask=causal() & segments(ids), backend="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [Splash(interpret=True), Flash(interpret=True)], ids=lambda x: x.name)
def test_kernels_refuse_auto_axes(kernel):
    shape = jax.ShapeDtypeStruct((8, 256, 4, 64), jnp.float32)
    args = AttentionArgs(shape, shape, shape, platform="tpu")
    assert kernel.unsupported_reason(args) is None
    reason = kernel.unsupported_reason(
        AttentionArgs(shape, shape, shape, platform="tpu", auto_axes=("data",))
    )
    assert "cannot partition" in reason and "data" in reason


def test_kernels_refuse_the_vma_check(refuses):
    mesh, arrays = make_mesh(AxisType.Auto, AxisType.Auto), qkv(0, b=4, t=4, s=4)
    run = jax.shard_map(
        lambda *x: attend(*x, backend=Splash(interpret=True)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with refuses("check_vma=False"):
        jax.eval_shape(run, *arrays)


@pytest.mark.parametrize(
    "backend, manual",
    [
        *(("reference", {"data", "tensor"}), ("blockwise_autodiff", {"data", "tensor"})),
        *(("decode", {"data", "tensor"}), ("blockwise", {"data", "tensor"}), ("blockwise", {"data"})),
    ],
)
def test_gradient_inside_shard_map_with_vma_check(backend, manual):
    """Key, value, slopes and sinks are replicated over an axis that the query is sharded over."""
    mesh, t = make_mesh(AxisType.Auto, AxisType.Auto), 1 if backend == "decode" else 70
    query, key, value = qkv(0, b=4, t=t, s=70, h=4, k=1)
    ids = jnp.sort(jnp.arange(280).reshape(4, 70) % 3 + 1, axis=1)
    options = {"slopes": jnp.linspace(0.1, 0.4, 4), "sinks": jnp.linspace(-1, 1, 4)}

    def run(query, key, value, ids, options):
        # The blocks of traced segments are known only at run time, so `blockwise` loops over them.
        mask = causal(69) if t == 1 else segments(ids)
        score = [alibi(options["slopes"]), score_fn(lambda s, b, h, q, k: s + options["slopes"][h] * q)]
        options = {"sinks": options["sinks"], "return_lse": True, "backend": backend}
        return attend(query, key, value, mask=mask, score=score, **options)

    def gradient(run):
        def loss(query, key, value, options):
            return weighted_sum(*run(query, key, value, ids, options))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(query, key, value, options)

    heads = "tensor" if "tensor" in manual else None
    specs = P("data", None, heads), P("data"), P("data"), P("data"), P(heads)
    out_specs = P("data", None, heads), P("data", None, heads)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names=manual)
    for got, expected in zip(*map(jax.tree.leaves, (gradient(sharded), gradient(run))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_recurrent_state_inside_shard_map_with_vma_check():
    mesh = make_mesh(AxisType.Auto, AxisType.Auto)
    query, key, value = qkv(0, b=4, t=6, s=6, h=2, k=2)
    gates = jnp.full((4, 6, 2, 1), -0.1)
    heads = P("data", None, "tensor")

    def loss(run, *x):
        return (run(*x)[0] ** 2).sum()

    def run(*x):
        return gated_linear_attention(*x, chunk=2)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(heads, heads, heads, heads), out_specs=(heads, P("data", "tensor"))
    )
    got, expected = (jax.jit(jax.grad(partial(loss, f), 2))(query, key, value, gates) for f in (sharded, run))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
