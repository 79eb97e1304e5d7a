"""Each model family trains on 8 simulated devices and compiles for a TPU slice.

The compilation needs libtpu, but no TPU.
"""

import dataclasses
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from attnlab import config as configs
from attnlab import sharding
from attnlab.train.session import Session
from tests.compilation import default_environment
from tests.programs import ROOT
from tests.selection import long

# Experiment of each family, with overrides that make it small: short rows, and widths that the mesh
# divides.
EXPERIMENTS = {
    "lm_docs": ["model.width=64", "model.depth=4", "data.sequence_length=64"],
    "recurrent_lm": ["model.width=64", "data.sequence_length=32"],
    "recurrent_translate": ["model.width=64", "optimizer.schedule.warmup=5", "optimizer.learning_rate=1e-2"],
    "translate": ["optimizer.schedule.warmup=5"],
    "speech": [f"model.{half}.width=64" for half in ("encoder", "decoder")] + ["optimizer.schedule.warmup=5"],
    "pronoun": ["model.attention.heads=2"],
    "caption": ["model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=2"],
    "caption:gates": ["model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=2"],
    "caption:prefix": ["model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=2"],
    "masked_lm": ["model.width=64", "data.sequence_length=64"],
    "digits": ["model.depth=2"],
    "contrastive": ["model.image.width=32", "model.text.width=32", "model.image.depth=2"],
}
OPTIONAL_DEPENDENCIES = {"digits": "sklearn", "speech": "espeakng_loader"}
COMMON_OVERRIDES = ["data.batch_size=16", "train.steps=20", "train.microbatches=1"]


def with_scan_and_remat(config):
    """Return the config with `scan=True` and `remat="full"` in every stack."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("remat", "scan"):
            changed[field.name] = {"remat": "full", "scan": True}[field.name]
        elif dataclasses.is_dataclass(value):
            changed[field.name] = with_scan_and_remat(value)
    return dataclasses.replace(config, **changed)


def small_experiment(name):
    """Return the experiment of a family with overrides that make it small."""
    pairs = [tuple(text.split("=", 1)) for text in (*COMMON_OVERRIDES, *EXPERIMENTS[name])]
    file, colon, argument = name.partition(":")
    spec = f"{ROOT / 'experiments' / file}.py{colon}{argument}"
    e = configs.override_all(configs.load(spec).config, pairs)
    return dataclasses.replace(e, model=with_scan_and_remat(e.model))


# A decoder, a recurrence and an encoder. The others compile longer.
SHORT = ("lm_docs", "recurrent_lm", "digits")


@pytest.fixture(params=[x if x in SHORT else long(x) for x in EXPERIMENTS])
def name(request):
    if request.param in OPTIONAL_DEPENDENCIES:
        pytest.importorskip(OPTIONAL_DEPENDENCIES[request.param])
    return request.param


@pytest.mark.slow
def test_family_trains_on_mesh(name, mesh_of):
    e = small_experiment(name)
    session = Session(e, mesh_of("fsdp:2,sequence:2,tensor:2"), e.data.build_tokenizer())
    state, losses = session.new_state(), []
    batches = e.data.train_iterator(session.tokenizer, seed=0, num_batches=2)
    for _ in range(e.train.steps):
        state, metrics = session.train_step(state, session.to_devices(next(batches)))
        losses.append(float(metrics["loss"]))
        assert metrics["skipped"] == 0
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses


@pytest.mark.preflight
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (extra `preflight`)")
def test_family_compiles_for_tpu_slice(name):
    """Compile in a subprocess, because libtpu prints warnings about the missing TPU to stderr."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env = default_environment() | variables
    command = [sys.executable, "-m", "tests.test_families", name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    devices, state, aliased = map(int, result.stdout.split()[-3:])
    assert devices == 16
    assert aliased >= state > 0  # the state is updated in place


def compile_for_tpu(name):
    """Compile the training step for a v5e slice; print devices, state bytes and aliased bytes."""
    from jax.experimental import topologies

    from attnlab.train.describe import per_device

    devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices=devices)
    e = small_experiment(name)
    session = Session(e, mesh, e.data.build_tokenizer())
    memory = session.compile_train_step().memory_analysis()
    print(len(devices), per_device(session.abstract_state), memory.alias_size_in_bytes)


if __name__ == "__main__":
    compile_for_tpu(sys.argv[1])
