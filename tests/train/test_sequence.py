"""Training with the sequence sharded over devices."""

import dataclasses
import re
from functools import cache
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.generation import Generator, SamplingParams
from attnlab.layers import AttentionConfig, Causal, MLPConfig, Sliding
from attnlab.layers.linear import Dtypes
from attnlab.models import DecoderConfig
from experiments.zoo import VARIANTS
from tests.layers.test_specs import initial
from tests.selection import long
from tests.train.small import TOKENIZER, make_experiment, make_session, random_batch

MESHES = (
    "fsdp:2,sequence:2,tensor:2",
    *map(long, ("data:2,sequence:4", "sequence:8")),
)
FLOAT64 = Dtypes("float64", "float64", "float64")
MODEL = {
    "pattern": (Sliding(window=5), Causal()),
    "attention": AttentionConfig(heads=4, kv_heads=2, sinks=True, softcap=20.0, dropout=0.1),
    "dropout": 0.1,
}


def packed_batch(seed):
    """Return a batch of rows with three documents and padding."""
    batch, ids = random_batch(seed), np.repeat([1, 2, 3, 0], [5, 1, 7, 3]).astype(np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (5, 1, 7)] + [np.zeros(3, np.int32)])
    rows = len(batch.tokens)
    weights = batch.weights * (ids > 0)
    return batch._replace(
        segments=np.tile(ids, (rows, 1)), positions=np.tile(positions, (rows, 1)), weights=weights
    )


def losses(mesh, steps, **model):
    session = make_session(make_experiment(model=MODEL | model, steps=steps, ema=0.9), mesh)
    state, found = session.new_state(), []
    for i in range(steps):
        state, metrics = session.train_step(state, packed_batch(i))
        found.append(float(metrics["loss"]))
    sums = session.evaluate(session.eval_params(state), [packed_batch(steps)])
    return [*found, sums["loss"]]


@pytest.fixture(scope="module")
def losses_of_one_device():
    with jax.enable_x64(True):
        return losses("single", 30, dtypes=FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_equal_those_of_one_device(mesh, losses_of_one_device):
    """Packed documents, windows, sinks, a softcap and dropout, also where shards end."""
    with jax.enable_x64(True):
        found = losses(mesh, 30, dtypes=FLOAT64)
    np.testing.assert_allclose(found, losses_of_one_device, rtol=0, atol=1e-8)


def loss_and_gradients(model, mesh):
    """Return the loss of packed rows in float64, and its gradients, with random parameters."""
    batch = jax.tree.map(jnp.asarray, packed_batch(0))
    config = DecoderConfig(width=16, feed_forward=MLPConfig(width=32), dtypes=FLOAT64)
    mesh = sharding.make_mesh(sharding.parse_mesh(mesh, len(jax.devices())))
    with jax.set_mesh(mesh):
        model = dataclasses.replace(config, attention=AttentionConfig(heads=4), **model).build(257)
        params = initial(model, batch.tokens, mesh)

        def loss(params):
            inputs = batch.tokens, batch.targets, batch.segments, batch.positions
            terms = model.apply({"params": params}, *inputs, method="loss_terms")
            return jnp.mean((terms.lse - terms.target_logit) * batch.weights)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(params))


def specs_of_every_part():
    """Return a layer with every score, and layers that pair every normalizer and every mixer."""
    scores = [score for spec in VARIANTS.values() for score in spec.scores]
    normalizers = [spec.normalizer for spec in VARIANTS.values() if spec.normalizer]
    mixers = [spec.mixer for spec in VARIANTS.values() if spec.mixer]
    pairs = zip_longest(normalizers, mixers)
    return (Causal(score=tuple(scores)),), tuple(Causal(normalizer=n, mixer=m) for n, m in pairs)


@pytest.mark.long
@pytest.mark.parametrize("pattern", specs_of_every_part(), ids=("scores", "normalizers and mixers"))
def test_every_score_normalizer_and_mixer_equals_one_device_in_float64(pattern):
    model = {"pattern": pattern, "depth": len(pattern)}
    with jax.enable_x64(True):
        results = [loss_and_gradients(model, mesh) for mesh in ("single", "data:2,sequence:4")]
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)


@cache
def compiled(mesh, length, **model):
    e = make_experiment(model={"feed_forward": MLPConfig(width=32), "remat": "full"} | model)
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, sequence_length=length))
    return make_session(e, mesh).compile_train_step()


def test_ring_gathers_no_keys():
    """Only numbers per token, such as ids of documents and losses, are gathered."""
    text = compiled("sequence:4", 1024).as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    assert gathered and set(gathered) <= {"8,1024", "8,1,1024"}
    assert re.search(r"collective-permute(-start)?\(", text)


def test_bytes_of_activations_fall_with_the_axis():
    sizes = [compiled(mesh, 1024).memory_analysis().temp_size_in_bytes for mesh in ("single", "sequence:4")]
    assert sizes[1] < 0.4 * sizes[0]


def test_look_up_exchanges_rows_and_gathers_no_table():
    text = compiled("fsdp:8", 64, tied=False, width=64, scan=False, depth=1).as_text()
    assert re.search(r" all-to-all(-start)?\(", text)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    assert gathered.count("257,64") == 1  # the table of the logits


def test_residual_stream_is_sharded_over_tensor():
    """Between two products that are sharded over tensor, a device holds a part of each row."""
    saved = []
    for mesh in ("single", "tensor:4"):
        program = compiled(mesh, 1024, depth=8, width=64, attention=AttentionConfig(heads=4))
        saved.append(program.memory_analysis().temp_size_in_bytes)
    assert saved[1] < 0.5 * saved[0]


def test_one_key_head_on_a_tensor_axis():
    """Multi-query attention: every device holds the single key head."""
    expected = []
    for mesh in ("single", "fsdp:2,tensor:4"):
        e = make_experiment(model={"attention": AttentionConfig(heads=4, kv_heads=1)})
        session = make_session(e, mesh)
        state, _ = session.train_step(session.new_state(), random_batch())
        _, metrics = session.train_step(state, random_batch())
        expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(*expected, rtol=1e-5)


def test_indivisible_length_is_not_sharded():
    """Rows of 15 tokens on an axis of size 4."""
    expected = []
    for mesh in ("single", "sequence:4"):
        session = make_session(make_experiment(), mesh)
        _, metrics = session.train_step(session.new_state(), random_batch(length=15))
        expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(*expected, rtol=1e-5)


def test_generation_on_a_mesh_with_the_axis():
    completions = []
    for mesh in ("single", "fsdp:2,sequence:2,tensor:2"):
        session = make_session(make_experiment(), mesh)
        generator = Generator(session.model, session.new_params(), TOKENIZER, 32, session.mesh)
        completions.append(
            [
                x.text
                for x in generator(["ab", "abcd"], max_new_tokens=6, sampling=SamplingParams(temperature=0.0))
            ]
        )
    assert completions[0] == completions[1]
