"""Ahead-of-time compilation of the training step for a TPU slice, without a TPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab.sharding import MESH_AXES
from tests.compilation import default_environment

PROGRAM = """
import json
import re
from collections import Counter

from jax.experimental import topologies

from attnlab import sharding
from attnlab.data import Bytes, Text
from attnlab.layers import AttentionConfig, GatedMLPConfig
from attnlab.layers.linear import Dtypes
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Experiment
from attnlab.train.session import Session

devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
experiment = Experiment(
    model=DecoderConfig(
        depth=4, width=512, attention=AttentionConfig(heads=8, kv_heads=4),
        feed_forward=GatedMLPConfig(width=1024),
        dtypes=Dtypes(compute="bfloat16"), remat="full",
    ),
    data=Text(tokenizer=Bytes(), sequence_length=256, batch_size=16),
    optimizer=AdamW(),
)
mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices=devices)
session = Session(experiment, mesh, Bytes().train([]))
compiled = session.compile_train_step()
memory = compiled.memory_analysis()
kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
import jax
from attnlab.train.describe import per_device
state = session.abstract_state
cube = topologies.get_topology_desc(topology_name="v5p:4x4x4", platform="tpu").devices
print(json.dumps({
    "devices": len(devices),
    "kind": devices[0].device_kind,
    "state": per_device(state),
    "arguments": memory.argument_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "meshes": [
        dict(sharding.make_mesh(sharding.parse_mesh(text, 64), cube).shape)
        for text in ("fsdp:8,tensor:8", "fsdp_tensor", "auto")
    ],
    "collectives": Counter(re.findall(rf" ({kinds})(?:-start)?\\(", compiled.as_text())),
}))
"""


LONG_ROWS = """
import json
import re

from jax.experimental import topologies

from attnlab import config, sharding
from attnlab.train.session import Session

devices = topologies.get_topology_desc(topology_name="v5p:4x4x4", platform="tpu").devices
mesh = sharding.make_mesh(sharding.parse_mesh("sequence:64", 64), devices)
length = {"data.sequence_length": "131072", "data.batch_size": "8"}
model = {"model.dtypes.compute": "bfloat16", "model.remat": "full"}
experiment = config.override_all(config.load("experiments/long_context.py").config, [*(length | model).items()])
compiled = Session(experiment, mesh, experiment.data.build_tokenizer()).compile_train_step()
text = compiled.as_text()
print(json.dumps({
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "gathers": len(re.findall("all-gather", text)),
    "permutes": len(re.findall("collective-permute", text)),
}))
"""
REMAT = """
import json
from dataclasses import replace

import jax
from jax.experimental import topologies

from attnlab import sharding
from attnlab.data import Bytes, Text
from attnlab.layers import AttentionConfig, MLPConfig, Save
from attnlab.models import DecoderConfig
from attnlab.train import SGD, Experiment
from attnlab.train.session import Session

devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
model = DecoderConfig(depth=4, width=128, attention=AttentionConfig(2), feed_forward=MLPConfig(8192))
sizes = {}
for storage in ("device", "host"):
    e = Experiment(
        model=replace(model, remat=Save(mlp_hidden=storage)),
        data=Text(tokenizer=Bytes(), sequence_length=128, batch_size=128), optimizer=SGD(),
    )
    session = Session(e, sharding.make_mesh({"fsdp": 2, "tensor": 2}, devices=devices), Bytes().train([]))
    memory = session.compile_train_step().memory_analysis()
    sizes[storage] = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
print(json.dumps(sizes))
"""
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)"
)


@pytest.mark.preflight
@needs_libtpu
def test_rows_of_131072_tokens_compile_for_a_slice_of_64_chips():
    """No chip holds rows: 8 rows of queries, keys, values and outputs take 4 GiB.

    That is in bfloat16 with 4 heads, whose width the kernel pads to 128.
    """
    report = run_program(LONG_ROWS)
    assert 0 < report["temporary"] < 4 * 8 * 131_072 * 4 * 128 * 2 / 2
    assert report["gathers"] == 0 and report["permutes"] > 0


def run_program(program, **variables):
    """Run in a subprocess because libtpu takes a lock and warns of the missing TPU on stderr.

    `variables` are added to its environment.
    """
    root = Path(__file__).parents[2]
    env = default_environment() | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(root),
        **variables,
    }
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=env, cwd=root
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.preflight
@needs_libtpu
def test_step_compiles_for_a_slice_of_16_chips():
    report = run_program(PROGRAM)
    assert (report["devices"], "v5" in report["kind"]) == (16, True)
    ones = dict.fromkeys(MESH_AXES, 1)
    square = ones | {"fsdp": 8, "tensor": 8}  # of parts of the torus's axes of 4
    assert report["meshes"] == [square, square, ones | {"fsdp": 64}]
    # The arguments contain the state once, which is updated in place. TPUs pad the smallest arrays.
    assert report["state"] <= report["arguments"] <= 1.2 * report["state"] + 2**20
    assert report["aliased"] >= report["state"]
    # Float32 parameters and both moments are sharded eight ways, over fsdp and tensor.
    assert report["state"] == pytest.approx(3 * 4 * report["parameters"] / 8, rel=0.1)
    # Rematerialized layers limit activations to a few megabytes of the 16 GiB.
    assert 0 < report["temporary"] < 256 * 2**20
    collectives = report["collectives"]
    assert collectives.get("all-gather", 0) > 0
    assert collectives.get("all-reduce", 0) + collectives.get("reduce-scatter", 0) > 0
    assert "all-to-all" not in collectives


@pytest.mark.preflight
@pytest.mark.long
@needs_libtpu
def test_stored_activations_take_memory_of_the_device_or_of_the_host():
    device, host = run_program(REMAT).values()
    # Products of 4 layers, 128 rows of 128 tokens and a width of 8192, in float32, over 4 chips.
    stored = 4 * 128 * 128 * 8192 * 4 / 4
    assert device[0] - host[0] > 0.5 * stored  # the host has those of the other layers
    assert (device[1], host[1]) == pytest.approx((0, stored), rel=0.1)
