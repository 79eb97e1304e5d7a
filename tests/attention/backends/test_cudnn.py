"""The cuDNN backend: its arguments to JAX, checked with XLA, and compilation for an absent GPU."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal, key_lengths, prefix, segments, softcap, window
from attnlab.attention.attend import make_dropout
from attnlab.attention.backends.cudnn import Cudnn
from attnlab.attention.backends.registry import AttentionArgs
from tests.attention.inputs import qkv
from tests.programs import run_python_json

ARGS = AttentionArgs(*(jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16),) * 3, platform="gpu")


def of_shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"platform": "tpu"}, "requires a GPU"),
        ({"sequence_axes": ("sequence",)}, "length is sharded over sequence"),
        ({"dropout": make_dropout(0.1, jax.random.key(0), None, False, False)}, "dropout"),
        ({"return_weights": True}, "weights"),
        ({"normalizer": jax.nn.relu}, "only the softmax"),
        ({"return_lse": True}, "no gradient"),
        ({"sinks": of_shape(4)}, "no gradient"),
        ({"score": softcap(3.0)}, "does not support scores"),
        ({"scale": jnp.float32(1)}, "Python number"),
        ({"query": of_shape(2, 256, 4, 64, dtype=jnp.float32)}, "bfloat16, float32"),
        ({"value": of_shape(2, 256, 4, 32)}, "64 and 32"),
        (dict.fromkeys(("query", "key", "value"), of_shape(2, 256, 4, 160)), "at most 128"),
        ({"mask": segments(jnp.ones((2, 256), int))}, "only the masks"),
        ({"mask": causal(3)}, "only the masks"),
        ({"mask": window(3, 3)}, "only the masks"),
        ({"mask": ~causal()}, "only the masks"),
        ({"mask": key_lengths(9) | causal()}, "only the masks"),
        ({"mask": prefix(3)}, "only the masks"),
        ({"mask": causal(), "query": of_shape(2, 257, 4, 64)}, "no more queries than keys"),
    ],
)
def test_unsupported_reasons(change, words):
    assert Cudnn().unsupported_reason(ARGS) is None
    assert words in Cudnn().unsupported_reason(dataclasses.replace(ARGS, **change))


def test_traced_offset_is_unsupported():
    @jax.jit
    def check(offset):
        args = dataclasses.replace(ARGS, mask=causal(offset))
        assert "only the masks" in Cudnn().unsupported_reason(args)

    check(0)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        causal(),
        causal() & window(5),
        window(5, 0),
        key_lengths(jnp.array([7, 0])),
        key_lengths(12, jnp.array([20, 3])),
        causal() & key_lengths(jnp.array([4, 99]), jnp.array([99, 0])) & key_lengths(6),
        window(3, 0) & key_lengths(jnp.array([4, 25])),
        window(9) & causal() & key_lengths(jnp.array([3, 0]), jnp.array([17, 20])),
    ],
    ids=str,
)
def test_arguments_to_jax_match_the_reference(mask, monkeypatch):
    """Run JAX's XLA implementation with the arguments for cuDNN, which needs a GPU."""
    xla = jax.nn.dot_product_attention
    xla_options = {}

    def call_xla(*x, implementation, **options):
        xla_options.update(options)
        out = xla(*x, **options)
        # The output of padded queries is undefined in cuDNN.
        lengths = options.get("query_seq_lengths", jnp.full(len(out), out.shape[1]))
        return jnp.where((jnp.arange(out.shape[1])[None] < lengths[:, None])[..., None, None], out, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call_xla)
    query, key, value = qkv(0, t=20, s=30, d=8, dv=8, dtype=jnp.float16)
    args = AttentionArgs(query, key, value, mask, scale=0.3, platform="gpu")
    assert Cudnn().unsupported_reason(args) is None

    def cudnn(*x):
        return Cudnn().run(dataclasses.replace(args, query=x[0], key=x[1], value=x[2]), (0, 0, 0, 0)).out

    def expected(*x):
        return attend(*x, mask=mask, scale=0.3, backend="reference")

    def output_and_gradients(f):
        return f(query, key, value), *jax.grad(lambda *x: f(*x).sum(), (0, 1, 2))(query, key, value)

    for actual, desired in zip(output_and_gradients(cudnn), output_and_gradients(expected), strict=True):
        np.testing.assert_allclose(actual, desired, atol=2**-6)
    for name, max_length in (("query_seq_lengths", 20), ("key_value_seq_lengths", 30)):
        if name in xla_options:
            assert xla_options[name].shape == (2,)
            assert np.all((xla_options[name] > 0) & (xla_options[name] <= max_length))


# Specification of the H100 SXM, from NVIDIA's data sheet and deviceQuery.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "compute capability 9.0" device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.13.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

PROGRAM = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab.attention import attend, causal, key_lengths, segments, window

jax.devices()  # registers the plugin
topology = topologies.get_topology_desc(
    "h100", platform="cuda", target_config=sys.argv[1], topology="1x1x4"
)
mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def calls(mask_of, spec=P("data", None, "tensor", None)):
    def shape(*sizes, spec=spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(query, key, value, ids):
        return jnp.sum(attend(query, key, value, mask=mask_of(ids)).astype(jnp.float32))

    arrays = shape(4, 1000, 8, 64), shape(4, 1000, 4, 64), shape(4, 1000, 4, 64)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, shape(4, 1000, spec=P(), dtype=jnp.int32))
        text = lowered.compile().as_text()
    return sorted(set(re.findall(r'__cudnn\\$(fmha[A-Za-z]*)', text)))


print(json.dumps({
    "none": calls(lambda ids: None),
    "causal": calls(lambda ids: causal()),
    "window": calls(lambda ids: causal() & window(100)),
    "replicated": calls(lambda ids: causal(), P(None, None, None, None)),
    "padding": calls(lambda ids: key_lengths(ids.sum(1))),
    "window and padding": calls(lambda ids: window(100, 0) & key_lengths(ids.sum(1))),
    "causal and padding": calls(lambda ids: causal() & key_lengths(ids.sum(1), ids.max(1))),
    "segments": calls(lambda ids: causal() & segments(ids)),
}))
"""


@pytest.mark.preflight
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin (extra `cuda`)"
)
def test_compiles_for_an_h100():
    """With `backend="auto"`, forward and backward call cuDNN for the supported masks only."""
    # The CUDA plugin checks for libraries that only execution needs.
    kernels = run_python_json(PROGRAM, H100, JAX_PLATFORMS="", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    assert kernels.pop("segments") == []
    for name, calls in kernels.items():
        assert calls == ["fmhaSoftmax", "fmhaSoftmaxBackward"], name
