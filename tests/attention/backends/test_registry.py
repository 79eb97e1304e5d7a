"""Selection of the backend by the platform of the arrays' devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal, explain
from attnlab.attention.backends import registry
from attnlab.attention.backends.registry import target_platforms
from tests.attention.inputs import qkv

SHAPE = jax.ShapeDtypeStruct((2, 256, 4, 16), jnp.float32)


@pytest.fixture(params=["tpu", "gpu"])
def default(request, monkeypatch):
    """Pretend that the default backend is an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def placed_on(platform, committed=True):
    """Return a stand-in for an array on a device that this machine does not have."""
    device = SimpleNamespace(platform=platform)
    return SimpleNamespace(sharding=SimpleNamespace(device_set=[device]), committed=committed)


def test_committed_arrays_decide(default):
    cpu = jax.device_put(np.ones(3), jax.devices("cpu")[0])
    assert target_platforms([cpu]) == ("cpu",)
    assert target_platforms([np.ones(3)]) == (default,)
    assert target_platforms([np.ones(3), cpu]) == ("cpu",)
    assert target_platforms([placed_on("cuda")]) == ("gpu",)
    with jax.default_device(jax.devices("cpu")[0]):
        assert target_platforms([placed_on(default)]) == (default,)
        assert target_platforms([placed_on(default, committed=False)]) == ("cpu",)


def test_default_device_decides_for_arrays_without_one(default):
    assert target_platforms([SHAPE]) == (default,)
    with jax.default_device(jax.devices("cpu")[0]):
        assert target_platforms([np.ones(3)]) == target_platforms([SHAPE]) == ("cpu",)
        assert explain(SHAPE, SHAPE, SHAPE).backend == "blockwise"


def test_mesh_decides(default):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert target_platforms([SHAPE]) == ("cpu",)
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    assert target_platforms([jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)]) == ("cpu",)


def test_arrays_under_transformations(default, monkeypatch):
    monkeypatch.setattr(registry, "_has_devices", lambda platform: True)
    cpu, seen = jax.device_put(jnp.ones(3), jax.devices("cpu")[0]), []

    def record(x):
        seen.append(target_platforms([x]))
        return (x * x).sum()

    jax.grad(record)(cpu)
    jax.vmap(record)(cpu)
    jax.jit(record)(cpu)
    assert seen == [("cpu",), ("cpu",), (default, "cpu")]


def test_arrays_on_the_cpu_take_its_order_while_an_accelerator_is_default(default):
    query, key, value = qkv(0, t=128, s=128, h=2, k=1, d=8, dv=8, dtype=jnp.bfloat16)
    arrays = jax.device_put((query, key, value), jax.devices("cpu")[0])
    expected = attend(*arrays, mask=causal(), backend="blockwise")
    assert explain(*arrays, mask=causal()).backend == "blockwise"
    for run in (attend, jax.jit(attend)):
        assert jnp.array_equal(run(*arrays, mask=causal()), expected)


def test_compiler_selects_within_jit(monkeypatch):
    """`jit` does not tell where its arguments are; a TPU kernel is not compiled for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(registry, "_has_devices", lambda platform: True)
    query, key, value = qkv(0, b=1, t=128, s=128, h=1, k=1)
    run = jax.jit(lambda *x: attend(*x, mask=causal()))
    assert "splash" in str(jax.make_jaxpr(run)(query, key, value))
    expected = attend(query, key, value, mask=causal(), backend="reference")
    assert jnp.allclose(run(query, key, value), expected, atol=1e-5)


def test_named_backend_runs_on_a_platform_that_supports_it(monkeypatch, refuses):
    monkeypatch.setattr(registry, "_has_devices", lambda platform: True)
    arrays = qkv(0, b=1, t=128, s=128, h=1, k=1)
    with jax.default_device(jax.devices("cpu")[0]):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert "splash" in str(jax.make_jaxpr(lambda *x: attend(*x, backend="splash"))(*arrays))
        with refuses("requires a TPU"):
            attend(*arrays, backend="splash")
