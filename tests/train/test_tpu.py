"""The training step compiled for a TPU slice that is not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import re
from collections import Counter

from jax.experimental import topologies

from attnlab import sharding
from attnlab.data import Bytes, Text
from attnlab.layers import Attention, GatedMLP
from attnlab.layers.parameters import Dtypes
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Experiment
from attnlab.train.session import Session

devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
experiment = Experiment(
    model=DecoderConfig(
        depth=4, width=512, attention=Attention(heads=8, kv_heads=4), feed_forward=GatedMLP(width=1024),
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
print(json.dumps({
    "devices": len(devices),
    "kind": devices[0].device_kind,
    "state": per_device(state),
    "arguments": memory.argument_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "collectives": Counter(re.findall(rf" ({kinds})(?:-start)?\\(", compiled.as_text())),
}))
"""


@pytest.mark.preflight
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
def test_the_step_compiles_for_a_slice_of_sixteen():
    """In a process of its own: libtpu takes a lock, and complains of the missing TPU on stderr."""
    root = Path(__file__).parents[2]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=600, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["devices"], "v5" in found["kind"]) == (16, True)
    # The state goes in once and is updated in place. TPUs pad the smallest arrays, so it is a little more.
    assert found["state"] <= found["arguments"] <= 1.2 * found["state"] + 2**20
    assert found["aliased"] >= found["state"]
    # Parameters and both moments, in float32, are cut eight ways: over fsdp and over tensor.
    assert found["state"] == pytest.approx(3 * 4 * found["parameters"] / 8, rel=0.1)
    # Recomputed layers keep activations to a few megabytes of the 16 GiB.
    assert 0 < found["temporary"] < 256 * 2**20
    collectives = found["collectives"]
    assert collectives.get("all-gather", 0) > 0
    assert collectives.get("all-reduce", 0) + collectives.get("reduce-scatter", 0) > 0
    assert "all-to-all" not in collectives
