"""Ring attention with the splash kernel: results against the reference, and its supported calls."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import (
    alibi,
    causal,
    exclude_backends,
    key_lengths,
    mask_fn,
    segments,
    softcap,
    window,
)
from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.backends.splash import Splash
from attnlab.attention.ring import Ring
from attnlab.attention.ring_kernel import EMPTY, FULL, meeting_kind
from tests.attention.backends.test_splash import gradients_of
from tests.attention.inputs import qkv
from tests.programs import run_python_json

KERNEL = Ring(Splash(max_block_size=128, interpret=True))
SHAPE = {"b": 2, "t": 512, "s": 512, "h": 2, "k": 1, "d": 8, "dv": 8}
IDS = np.repeat([[1, 2, 3, 0], [4, 4, 1, 1]], [100, 40, 300, 72], axis=1)
SINKS = jnp.asarray([0.5, -1.0])
CASES = {
    "causal, segments": (causal() & segments(jnp.asarray(IDS)), None),
    "window, lengths, softcap": (window(150, 3) & key_lengths(jnp.array([512, 130])), softcap(2.0)),
    "segments": (segments(jnp.asarray(IDS)), None),
}


def results(backend, dtype, case, mesh=None):
    """Return output, log-sum-exp and the gradients of query, key, value and sinks."""
    mask, score = CASES[case]
    # Padding holds NaN, which must reach nothing.
    arrays = qkv(0, **SHAPE)
    if "segments" in case:
        arrays = [jnp.where((IDS == 0)[..., None, None], jnp.nan, x) for x in arrays]
    arrays = [(x / 2).astype(jnp.bfloat16).astype(dtype) for x in arrays]
    if mesh is None:
        return gradients_of(backend, mask, score)(
            *arrays, SINKS.astype(jnp.promote_types(dtype, jnp.float32))
        )
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, jax.NamedSharding(mesh, P(None, "sequence"))) for x in arrays]
        return gradients_of(backend, mask, score)(*arrays, SINKS)


@pytest.mark.parametrize(
    "case, dtype, tolerance",
    [
        pytest.param("causal, segments", jnp.float32, 1e-5, marks=pytest.mark.slow),
        # The scaled query, and the output and gradients of each meeting, are rounded (2^-8 each).
        pytest.param("causal, segments", jnp.bfloat16, 2**-6, marks=pytest.mark.slow),
        pytest.param("window, lengths, softcap", jnp.float32, 1e-5, marks=pytest.mark.slow),
        ("segments", jnp.float32, 1e-5),
    ],
)
def test_splash_in_a_ring_matches_the_reference_in_float64(case, dtype, tolerance):
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, results("reference", jnp.float64, case))
    mesh = jax.make_mesh((2,), ("sequence",), (AxisType.Explicit,), devices=jax.devices()[:2])
    got = results(KERNEL, dtype, case, mesh)
    for x, y in zip(
        jax.tree.leaves(got[0][1:]) + jax.tree.leaves(got[1]),
        jax.tree.leaves(expected[0][1:]) + jax.tree.leaves(expected[1]),
        strict=True,
    ):
        x = np.asarray(x, np.float64)
        size = max(1.0, np.abs(y[np.isfinite(y)]).max())
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("bounds", [(None, 0), (5, 0), (3, 2), (None, None), (40, None), (-2, 6)])
@pytest.mark.parametrize("lengths", [(4, 4), (6, 3)])
def test_kinds_of_meetings_are_those_of_the_dense_mask(bounds, lengths):
    t, s = lengths
    left, right = bounds
    q, kv = np.arange(6 * t)[:, None], np.arange(6 * s)[None]
    dense = np.ones((6 * t, 6 * s), bool)
    dense &= True if left is None else kv - q >= -left
    dense &= True if right is None else kv - q <= right
    for i, j in np.ndindex(6, 6):
        block = dense[i * t : (i + 1) * t, j * s : (j + 1) * s]
        kind = meeting_kind(bounds, lengths, j * s - i * t)
        assert (kind == FULL) == block.all() and (kind == EMPTY) == (not block.any())


ARGS = AttentionArgs(
    *(jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16),) * 3,
    mask=causal(),
    platform="tpu",
    sequence_axes=("sequence",),
    sequence_shards=4,
)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"platform": "cpu"}, "requires a TPU"),
        ({"query": jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16), "mask": None}, None),
        ({"query": jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)}, "as many queries as keys"),
        (
            {name: jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16) for name in ("query", "key", "value")},
            "128 keys",
        ),
        ({"score": alibi(4)}, "softcap"),
        ({"mask": mask_fn(lambda b, h, q, k: k != 3)}, "in a ring, the only masks"),
    ],
)
def test_kernel_of_the_parts(change, words):
    assert Ring().local_kernel(ARGS) == ("splash", {})
    assert Ring().block_sizes(ARGS) is None
    kernel, refusals = Ring().local_kernel(dataclasses.replace(ARGS, **change))
    assert kernel == ("blockwise" if words else "splash")
    assert words is None or words in refusals["splash"]


def test_an_excluded_kernel_is_not_used_in_a_ring():
    with exclude_backends("splash"):
        assert Ring().local_kernel(ARGS) == ("blockwise", {"splash": "exclude_backends excludes it"})


PROGRAM = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab.attention import attend, causal, segments
from attnlab.attention.backends.registry import record_selections

devices = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[:4]
mesh = Mesh(np.array(devices), ("sequence",), axis_types=(AxisType.Explicit,))


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(None, "sequence")))


def loss(query, key, value, ids):
    return jnp.sum(attend(query, key, value, mask=causal() & segments(ids)).astype(jnp.float32))


arrays = shape(2, 8192, 8, 128), shape(2, 8192, 2, 128), shape(2, 8192, 2, 128)
selections = []
with jax.set_mesh(mesh), record_selections(selections.append):
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, shape(2, 8192, dtype=jnp.int32)).compile()
text = program.as_text()
# The dtypes of the sends in loops, and whether a kernel runs between the start and the end of each.
bodies = [part for part in text.split("\\n\\n") if not part.startswith("ENTRY")]
sends = []
for body in bodies:
    for name, dtype in re.findall(r"(%[\\w.-]+) = \\((\\w+)\\[.* collective-permute-start\\(", body):
        during = body[body.index(f"{name} = ") : body.index(f"collective-permute-done({name})")]
        sends.append((dtype, "tpu_custom_call" in during or "conditional(" in during))
print(json.dumps({
    "backend": str(selections[0]),
    "kernels": sorted(set(re.findall("splash_mha_(?:fwd|dq|dkv)", text))),
    "calls": text.count('custom_call_target="tpu_custom_call"'),
    "sends": sorted(sends),
    "gathers": len(re.findall(" all-gather", text)),
    "temporary": program.memory_analysis().temp_size_in_bytes,
}))
"""


@pytest.mark.preflight
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
def test_ring_compiles_with_splash_for_an_absent_tpu():
    report = run_python_json(
        PROGRAM, "v5p:2x2x1", JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    assert report["backend"] == "ring (splash)"
    assert report["kernels"] == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
    # Keys are sent while the kernels compute, forward and backward, and so are the sums of their
    # gradients, in float32.
    assert report["sends"] == [["bf16", True], ["bf16", True], ["f32", True]], report
