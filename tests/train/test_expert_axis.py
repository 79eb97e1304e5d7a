"""Training a mixture of experts with the experts sharded over devices."""

import math

import jax
import numpy as np
import pytest

from attnlab.generation import Generator, SamplingParams
from attnlab.layers import ExpertsConfig
from attnlab.train import AdamW, Constant
from attnlab.train.describe import per_device
from tests.selection import long
from tests.train.small import TOKENIZER, make_experiment, make_session
from tests.train.test_sequence import FLOAT64, packed_batch
from tests.train.test_sharding_step import ROWS, WIDTH, compiled, named

# Meshes with each other axis, and with the expert axis alone.
MESHES = (
    "fsdp:2,expert:2,tensor:2",
    *map(long, ("data:2,expert:4", "expert:8", "fsdp:2,expert:2,sequence:2")),
)
EXPERTS = ExpertsConfig(8, 2, width=20, bias=True, balance_loss_weight=0.1)


def uneven_batch(seed):
    """Return a packed batch in which a row is only padding, and so all on one device."""
    batch = packed_batch(seed)
    batch.segments[3], batch.weights[3] = 0, 0
    return batch


def curve(mesh):
    """Return the losses and balance losses of 15 steps."""
    optimizer = AdamW(learning_rate=0.01, schedule=Constant())
    model = {"feed_forward": EXPERTS, "dtypes": FLOAT64, "depth": 1, "scan": False}
    session = make_session(make_experiment(optimizer=optimizer, model=model), mesh)
    state, found = session.new_state(), []
    for i in range(15):
        state, metrics = session.train_step(state, session.to_devices(uneven_batch(i % 3)))
        found.append([float(metrics["loss"]), float(metrics["balance"])])
    return np.array(found)


@pytest.fixture(scope="module")
def curve_of_one_device():
    with jax.enable_x64(True):
        return curve("single")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_equal_those_of_one_device(mesh, curve_of_one_device):
    """Losses and balance losses are equal, however the routing loads the devices."""
    assert curve_of_one_device[-1, 0] < curve_of_one_device[0, 0] - 0.1
    with jax.enable_x64(True):
        found = curve(mesh)
    np.testing.assert_allclose(found, curve_of_one_device, rtol=0, atol=1e-8)


def expert_bytes(mesh):
    """Return the bytes per device of the experts' parameters and moments, and of all others."""
    session = make_session(make_experiment(model={"feed_forward": EXPERTS}), mesh)
    state = named((session.abstract_state.params, session.abstract_state.opt_state))
    experts = [x for name, x in state.items() if "feed_forward/" in name and "router" not in name]
    return per_device(experts), per_device(list(state.values())) - per_device(experts)


def test_bytes_of_experts_fall_with_the_axis():
    experts, others = expert_bytes("single")
    assert expert_bytes("expert:8") == (experts // 8, others)
    assert expert_bytes("data:2,expert:4") == (experts // 4, others)
    kernels_and_biases = expert_bytes("expert:2,tensor:2")[0]
    assert experts // 4 < kernels_and_biases < experts // 3  # the biases of "down" have no width


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert:8", "fsdp:2,expert:2,tensor:2"])
def test_step_gathers_tokens_and_no_experts(mesh):
    """Kernels are gathered over fsdp only, tokens over expert; their sums are scattered."""
    session, found = compiled(mesh, feed_forward=EXPERTS, depth=1)
    shape, length = session.mesh.shape, session.experiment.data.sequence_length
    rows = ROWS // shape["data"] // shape["fsdp"]  # of the devices of an expert axis
    tokens = {rows * length * WIDTH, rows * length * EXPERTS.top_k}
    local = rows // shape["expert"] * length * WIDTH  # of the residual stream, see test_sharding_step
    used = set()
    for x in jax.tree.leaves(session.abstract_state.params):
        axes = (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
        parts = (1 if a in (None, "fsdp") else shape[a] for a in axes)
        shard = [size // n for size, n in zip(x.shape, parts, strict=True)]
        used |= {math.prod(shard), math.prod(shard[1:])} if "fsdp" in axes else set()
    gathered = {math.prod(c.shape) for c in found if c.kind == "all-gather"}
    assert tokens <= gathered
    assert gathered <= tokens | {local} | (used if shape["fsdp"] > 1 else set())
    assert "all-to-all" not in {c.kind for c in found}


@pytest.mark.slow
def test_generation_on_a_mesh_with_the_axis():
    completions = []
    for mesh in ("single", "fsdp:2,expert:2,tensor:2"):
        session = make_session(make_experiment(model={"feed_forward": EXPERTS, "depth": 1}), mesh)
        generator = Generator(session.model, session.new_params(), TOKENIZER, 32, session.mesh)
        greedy = SamplingParams(temperature=0.0)
        completions.append(
            [x.text for x in generator(["ab", "abcd", "x"], max_new_tokens=6, sampling=greedy)]
        )
    assert completions[0] == completions[1]
