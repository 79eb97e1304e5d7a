"""Compilation of the two TPU kernels for absent TPUs, as `attend` selects them."""

import importlib.util
import json

import jax
import pytest

from attnlab.attention import attend
from tests.attention.inputs import qkv
from tests.programs import run_python_json


def test_platform_is_the_one_traced_for():
    query, key, value = qkv(0, b=1, t=128, s=128, h=1, k=1)

    def kernels(*arrays):
        return "splash" in str(jax.make_jaxpr(attend)(*arrays))

    assert not kernels(query, key, value)
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=tpu)):
        assert kernels(query, key, value)
    with jax.default_device("tpu"):
        assert kernels(query, key, value)


PROGRAM = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab.attention import alibi, attend, causal, key_lengths, segments, softcap, window

devices = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[:4]
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
ROWS, REPLICATED = P("data", None, "tensor", None), P(None, None, None, None)


def kernels(mask_of, dtype=jnp.bfloat16, width=128, value_width=128, length=3000, spec=ROWS, **options):
    def shape(*sizes, spec=spec, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(query, key, value, ids, sinks):
        out, lse = attend(query, key, value, mask=mask_of(ids), sinks=sinks, return_lse=True, **options)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    arrays = shape(4, length, 8, width), shape(4, length, 4, width), shape(4, length, 4, value_width)
    ids = shape(4, length, spec=P(spec[0], None), dtype=jnp.int32)
    sinks = shape(8, spec=P(spec[2]), dtype=jnp.float32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 4))).lower(*arrays, ids, sinks).compile()
    text = compiled.as_text()
    calls = text.count('custom_call_target="tpu_custom_call"')
    names = "splash_mha_(?:fwd|dq|dkv)|flash_attention|flash_mha_bwd_(?:dq|dkv)"
    return calls, sorted(set(re.findall(names, text))), compiled.memory_analysis().temp_size_in_bytes


dense = np.random.default_rng(0).random((1000, 1000)) < 0.5
print(json.dumps({
    "segments": kernels(lambda ids: causal() & segments(ids)),
    "window, float32, a wide head": kernels(lambda ids: causal() & window(500), jnp.float32, 256, 256),
    "softcap, a narrow head": kernels(lambda ids: causal(), width=64, value_width=32, score=softcap(30.0)),
    "dense, replicated": kernels(lambda ids: dense, length=1000, spec=REPLICATED),
    "short, odd": kernels(lambda ids: None, width=80, value_width=80, length=131),
    "traced key lengths": kernels(lambda ids: causal() & key_lengths(ids[:, 0])),
    "flash, biased": kernels(lambda ids: causal(), length=2000, score=alibi(8)),
    "flash, float32, a wide head": kernels(
        lambda ids: None, jnp.float32, 256, 192, length=1500, score=alibi(8)
    ),
    "a wide head": kernels(lambda ids: segments(ids), width=192, value_width=128, length=4096),
}))
"""


# The gradient alone for (head width, bytes of an element, softcap, segments); returns block sizes.
GRADIENTS = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab.attention import attend, causal, segments, softcap

devices = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[:1]
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Explicit,))


def block_size(width, itemsize, capped, masked):
    def shape(*sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*[None] * len(sizes))))

    def loss(query, key, value, ids):
        mask = causal() & segments(ids) if masked else causal()
        out = attend(query, key, value, mask=mask, score=softcap(50.0) if capped else None, backend="splash")
        return jnp.sum(out.astype(jnp.float32))

    arrays = [shape(1, 8192, 16, width, dtype={2: jnp.bfloat16, 4: jnp.float32}[itemsize])] * 3
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        text = gradient.lower(*arrays, shape(1, 8192, dtype=jnp.int32)).compile().as_text()
    return int(re.search(r"block_q_dkv[^0-9]+([0-9]+)", text)[1])


print(json.dumps([block_size(*case) for case in json.loads(sys.argv[2])]))
"""
SPLASH_ROWS = {
    "v5e:2x2": [(128, 2, True, False), (128, 2, False, True), (256, 4, True, True), (128, 2, True, True)],
    "v5p:2x2x1": [(128, 2, False, True), (256, 4, True, True), (64, 2, True, True), (512, 4, True, True)],
    "v6e:2x2": [(128, 2, True, True), (256, 4, True, True), (512, 4, True, True)],
}
SPLASH_SIZES = {
    "v5e:2x2": [1024, 1024, 512, 512],
    "v5p:2x2x1": [1024, 512, 512, 256],
    "v6e:2x2": [1024, 1024, 512],
}


@pytest.mark.preflight
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
@pytest.mark.parametrize("topology", SPLASH_ROWS)
def test_bare_gradient_fits_vmem_for_each_row_of_the_table(topology):
    """Each row of `splash_blocks.TABLE` compiles at its own limits, with its block size."""
    cases = json.dumps(SPLASH_ROWS[topology])
    sizes = run_python_json(
        GRADIENTS,
        topology,
        cases,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    assert sizes == SPLASH_SIZES[topology]


@pytest.mark.preflight
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpu(topology):
    """With `backend="auto"`, the mesh determines the platform and its kernels are used."""
    kernels = run_python_json(
        PROGRAM, topology, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    # Lengths take no more memory than segments: the mask is not stored densely.
    assert kernels["traced key lengths"][2] <= kernels["segments"][2]
    for name, (*calls, _) in kernels.items():
        splash = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
        flash = ["flash_attention", "flash_mha_bwd_dkv", "flash_mha_bwd_dq"]
        assert calls == [3, flash if name.startswith("flash") else splash], name
