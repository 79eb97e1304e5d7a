"""Ahead-of-time compilation of every score, normalizer and mixer for a TPU slice, without a TPU."""

import importlib.util

import pytest

from tests.programs import run_python_json

PROGRAM = """
import json

import jax
from jax.experimental import topologies

from attnlab import sharding
from attnlab.data import Bytes, Text
from attnlab.layers import AttentionConfig, MLPConfig
from attnlab.layers.linear import Dtypes, parameter_name
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Experiment
from attnlab.train.session import Session
from experiments.zoo import VARIANTS

devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
experiment = Experiment(
    model=DecoderConfig(
        depth=len(VARIANTS), width=256, attention=AttentionConfig(heads=8), feed_forward=MLPConfig(width=256),
        pattern=tuple(VARIANTS.values()), dtypes=Dtypes(compute="bfloat16"), remat="full",
    ),
    data=Text(tokenizer=Bytes(), sequence_length=128, batch_size=16),
    optimizer=AdamW(),
)
mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices=devices)
session = Session(experiment, mesh, Bytes().train([]))
session.compile_train_step()
names = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(session.abstract_state.params)]
print(json.dumps({"kind": devices[0].device_kind, "names": names}))
"""


@pytest.mark.preflight
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
def test_every_variant_compiles_for_a_slice_of_16_chips():
    """All variants are layers of one model. A subprocess, because libtpu takes a lock."""
    report = run_python_json(
        PROGRAM, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    assert "v5" in report["kind"]
    names = " ".join(report["names"])
    assert all(
        part in names for part in ("score_CoPE", "heads_after", "lambda_keys", "up_key", "value_weights")
    )
