"""The Tokamax backend with its XLA implementation, and compilation for an absent GPU."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import alibi, attend, bias, causal, key_lengths, segments, softcap, window
from attnlab.attention.attend import make_dropout
from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.backends.tokamax import Tokamax
from tests.attention.backends.test_cudnn import H100
from tests.attention.inputs import qkv
from tests.programs import run_python_json

ARGS = AttentionArgs(*(jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16),) * 3, platform="gpu")
INSTALLED = importlib.util.find_spec("tokamax") is not None
needs_tokamax = pytest.mark.skipif(not INSTALLED, reason="needs tokamax")
IDS = jnp.array([[0, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 3, 3, 3]])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sequence_axes": ("sequence",)}, "length is sharded over sequence"),
        ({"dropout": make_dropout(0.1, jax.random.key(0), None, False, False)}, "dropout"),
        ({"return_lse": True}, "log-sum-exp"),
        ({"sinks": jnp.zeros(4)}, "log-sum-exp"),
        ({"score": softcap(3.0)}, "only additive"),
        ({"scale": jnp.float32(1)}, "Python number"),
        ({"query": jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)}, "bfloat16, float32"),
        (
            {"score": alibi(jnp.ones(4)), "key": jax.ShapeDtypeStruct((2, 2**20, 4, 64), jnp.bfloat16)},
            "8.0 GiB",
        ),
        ({"mask": window(3), "key": jax.ShapeDtypeStruct((2, 2**23, 4, 64), jnp.bfloat16)}, "2.0 GiB"),
        ({}, "compute capability 8.0"),
    ],
)
def test_unsupported_reasons(change, words, monkeypatch):
    if jax.default_backend() == "gpu" or not (INSTALLED or change):
        pytest.skip("needs tokamax and a machine without a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert words in Tokamax().unsupported_reason(dataclasses.replace(ARGS, **change))


def test_rejected_if_tokamax_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Tokamax().unsupported_reason(ARGS) == "tokamax is not installed"
    assert "requires a GPU" in Tokamax().unsupported_reason(dataclasses.replace(ARGS, platform="tpu"))


@needs_tokamax
@pytest.mark.parametrize(
    "mask",
    [
        None,
        causal(),
        causal(2),
        window(2) & causal(),
        segments(IDS[:, :5], IDS),
        key_lengths(jnp.array([3, 0])),
    ],
    ids=lambda mask: type(mask).__name__,
)
@pytest.mark.parametrize("biased", [False, True])
def test_tokamax_matches_reference(mask, biased):
    """Includes rows without keys. Runs the XLA implementation, since the kernel needs a GPU."""
    query, key, value = qkv(0, d=8, dv=16, dtype=jnp.bfloat16)
    slopes = jnp.linspace(0.1, 1, 4)

    def output_and_gradients(backend):
        def out(query, key, value, table):
            score = bias(table[None]) if biased else None
            return attend(query, key, value, mask=mask, score=score, scale=0.3, backend=backend)

        table = slopes[:, None, None] * jnp.sin(jnp.arange(35.0)).reshape(1, 5, 7)
        args = query, key, value, table
        return out(*args), *jax.grad(lambda *x: (out(*x) ** 2).sum(), (0, 1, 2, 3))(*args)

    got, expected = output_and_gradients(Tokamax("xla")), output_and_gradients("reference")
    for actual, desired in zip(got, expected, strict=True):
        assert actual.dtype == desired.dtype
        actual, desired = (np.asarray(x, np.float32) for x in (actual, desired))
        np.testing.assert_allclose(actual, desired, atol=2**-4, rtol=2**-5)


PROGRAM = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
import tokamax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab.attention import attend, bias, causal, segments, window

jax.devices()  # registers the plugin
topology = topologies.get_topology_desc(
    "h100", platform="cuda", target_config=sys.argv[1], topology="1x1x4"
)
mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def calls(mask_of):
    def shape(*sizes, spec=P("data", None, "tensor", None), dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(query, key, value, table, ids):
        out = attend(query, key, value, mask=mask_of(ids), score=bias(table))
        return jnp.sum(out.astype(jnp.float32))

    arrays = shape(4, 1000, 8, 64), shape(4, 1000, 4, 64), shape(4, 1000, 4, 64)
    table = shape(1, 8, 1000, 1000, spec=P(None, "tensor"), dtype=jnp.float32)
    with jax.set_mesh(mesh), tokamax.config.cross_compile(True):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(
            *arrays, table, shape(4, 1000, spec=P(), dtype=jnp.int32)
        )
        text = lowered.compile().as_text()
    return len(re.findall('custom_call_target="__gpu.xla.gpu.triton"', text))


print(json.dumps({
    "none": calls(lambda ids: None),
    "causal": calls(lambda ids: causal()),
    "segments": calls(lambda ids: causal() & segments(ids)),
}))
"""


@needs_tokamax
@pytest.mark.preflight
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin (extra `cuda`)"
)
def test_compiles_for_an_h100():
    """With `backend="auto"`, forward and backward call one Triton kernel each."""
    num_kernels = run_python_json(PROGRAM, H100, JAX_PLATFORMS="", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    for name, calls in num_kernels.items():
        assert calls == 2, name
