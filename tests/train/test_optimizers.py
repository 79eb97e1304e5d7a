"""Optimizers, learning-rate schedules and parameter rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.errors import InputError
from attnlab.train import (
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    InverseSquareRoot,
    Lion,
    Muon,
    Rule,
    ScheduleFree,
    WarmupStableDecay,
    optimizers,
)
from tests.train.small import make_experiment, make_session, random_batch

PARAMS = {
    "layers": {"up": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.linspace(0, 1, 4)}},
    "norm": {"scale": jnp.linspace(1, 2, 3)},
}
GRADS = jax.tree.map(lambda p: jnp.sin(7 * p) + 0.1, PARAMS)


def updates(config, params=PARAMS, grads=GRADS, steps=20, count=1, rules=()):
    """Apply `count` updates with the same gradients; return the last one, the params and state."""
    transformation = optimizers.make_optimizer(config, params, steps, rules)
    state = transformation.init(params)
    for _ in range(count):
        change, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return change, params, state


def assert_trees_equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-6, "atol": 1e-7} | tolerance))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        AdamW(learning_rate=3e-2, schedule=Constant()),
        Lion(learning_rate=1e-2, schedule=Constant()),
        Adafactor(learning_rate=1e-1, schedule=Constant(), min_dim_size_to_factor=8),
        SGD(learning_rate=3.0, schedule=Constant()),
        Muon(learning_rate=1e-1, schedule=Constant()),
        ScheduleFree(learning_rate=3e-2, schedule=Constant(warmup=2)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_optimizer_memorizes_a_batch(config):
    session = make_session(make_experiment(optimizer=config))
    state, batch = session.new_state(), session.to_devices(random_batch())
    first = session.evaluate(session.eval_params(state), [random_batch()])["loss"]
    for _ in range(20):
        state, metrics = session.train_step(state, batch)
    assert float(metrics["skipped"]) == 0
    assert session.evaluate(session.eval_params(state), [random_batch()])["loss"] < first - 0.3


def test_adamw_equals_explicit_formula_and_optax():
    config = AdamW(learning_rate=0.1, schedule=Constant(), weight_decay=0.2, rules=(), clip_norm=None)
    _, params, _ = updates(config, count=3)
    for updated, p, g in zip(*map(jax.tree.leaves, (params, PARAMS, GRADS)), strict=True):
        p, g, m, v = np.float64(p), np.float64(g), 0, 0
        for t in range(1, 4):
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            p = p - 0.1 * (step + 0.2 * p)
        np.testing.assert_allclose(updated, p, rtol=1e-5)
    adamw = optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.2)
    expected, state = PARAMS, adamw.init(PARAMS)
    for _ in range(3):
        change, state = adamw.update(GRADS, state, expected)
        expected = optax.apply_updates(expected, change)
    assert_trees_equal(params, expected)


@pytest.mark.parametrize("config", [AdamW(), Lion(), SGD(), Adafactor()], ids=lambda c: type(c).__name__)
def test_weight_decay_is_decoupled(config):
    """The decay is proportional to the parameters and independent of the gradient."""
    plain = dataclasses.replace(config, weight_decay=0.0, schedule=Constant(), learning_rate=0.1)
    decayed = dataclasses.replace(plain, weight_decay=0.5, rules=())
    without, _, _ = updates(plain)
    change, _, _ = updates(decayed)
    assert_trees_equal(change, jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, without, PARAMS), atol=1e-6)


def test_rules_multiply_rate_and_decay_of_matching_parameters():
    plain = AdamW(learning_rate=0.1, schedule=Constant(), weight_decay=0.5, rules=())
    rules = (Rule("kernel$", learning_rate=2.0), Rule("^layers/", learning_rate=3.0, weight_decay=0.0))
    before, _, _ = updates(plain)
    after, _, _ = updates(dataclasses.replace(plain, rules=rules))
    assert_trees_equal(after["norm"], before["norm"])
    without, _, _ = updates(dataclasses.replace(plain, weight_decay=0.0))
    assert_trees_equal(after["layers"]["up"]["kernel"], 6 * without["layers"]["up"]["kernel"])
    assert_trees_equal(after["layers"]["up"]["bias"], 3 * without["layers"]["up"]["bias"])


def test_default_rules_exclude_scales_and_biases_from_decay():
    grads = jax.tree.map(jnp.zeros_like, GRADS)
    change, _, _ = updates(SGD(learning_rate=0.1, schedule=Constant(), weight_decay=0.5), grads=grads)
    assert not change["norm"]["scale"].any()
    assert not change["layers"]["up"]["bias"].any()
    np.testing.assert_allclose(change["layers"]["up"]["kernel"], -0.05 * PARAMS["layers"]["up"]["kernel"])


def test_make_optimizer_rejects_rules_without_match():
    with pytest.raises(
        InputError, match="'nothing' matches no parameter; names are like layers/up/bias, norm/scale"
    ):
        updates(AdamW(rules=(Rule("nothing"),)))
    with pytest.raises(InputError, match="'\\(' is not a regular expression"):
        updates(AdamW(rules=(Rule("("),)))
    updates(AdamW(rules=()), rules=(Rule("nothing"),))  # allowed for rules of the model


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(), {0: 1, 99: 1}),
        (Constant(warmup=4), {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        (Cosine(warmup=20, final=0.1), {0: 0.05, 20: 1, 60: 0.55, 100: 0.1, 200: 0.1}),
        (Cosine(warmup=0, final=0.0), {0: 1, 50: 0.5, 100: 0}),
        (WarmupStableDecay(warmup=10, decay=0.2), {0: 0.1, 10: 1, 80: 1, 90: 0.5, 100: 0}),
        (WarmupStableDecay(warmup=0, decay=0.5, final=0.5), {0: 1, 50: 1, 75: 0.75, 100: 0.5}),
        (InverseSquareRoot(warmup=25), {0: 0.04, 25: 1, 100: 0.5, 225: 1 / 3}),
    ],
    ids=repr,
)
def test_schedule_values(schedule, values):
    rate = optimizers.learning_rate(AdamW(learning_rate=2.0, schedule=schedule), 100)
    for step, factor in values.items():
        assert float(rate(step)) == pytest.approx(2 * factor, abs=1e-6), step


def test_muon_orthogonalizes_matrices_and_uses_adam_for_the_rest():
    config = Muon(learning_rate=1.0, schedule=Constant(), weight_decay=0.0, momentum=0.0)
    grads = jax.tree.map(lambda g: g + 0.3 * jax.random.normal(jax.random.key(0), g.shape), GRADS)
    change, _, _ = updates(config, grads=grads)
    values = np.linalg.svd(change["layers"]["up"]["kernel"], compute_uv=False)
    scale = 0.2 * np.sqrt(4)  # root mean square of 0.2 for an orthogonal 3 x 4 matrix
    # The Newton-Schulz polynomial maps singular values to about 0.7 to 1.2.
    np.testing.assert_allclose(values, scale, rtol=0.35)
    # Adam's first step with Nesterov momentum, b1 = 0.9 (Dozat 2016, algorithm 2).
    first = 0.9 * (1 - 0.9) / (1 - 0.9**2) + (1 - 0.9) / (1 - 0.9)
    np.testing.assert_allclose(np.abs(change["norm"]["scale"]), first, rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2"])
def test_muon_on_a_mesh_equals_one_device(mesh):
    batch = random_batch()
    params = []
    for where in ("single", mesh):
        session = make_session(make_experiment(optimizer=Muon(schedule=Constant())), where)
        state = session.new_state()
        for _ in range(3):
            state, _ = session.train_step(state, session.to_devices(batch))
        params.append(jax.device_get(state.params))
        assert jax.tree.map(lambda x: x.sharding.spec, state.params) == jax.tree.map(
            lambda x: x.sharding.spec, session.abstract_state.params
        )
    assert_trees_equal(*params, atol=2e-5, rtol=1e-3)


def test_schedule_free_evaluates_the_average():
    """The evaluated point is the running mean of the iterates z of the base steps (equation 4)."""
    config = ScheduleFree(
        learning_rate=0.1, schedule=Constant(), weight_decay=0.0, rules=(), interpolation=0.9, b2=0.5
    )
    transformation = optimizers.make_optimizer(config, PARAMS, 20)
    params, state, points = PARAMS, transformation.init(PARAMS), []
    for _ in range(4):
        change, state = transformation.update(GRADS, state, params)
        params = optax.apply_updates(params, change)
        points.append(state.z)
    mean = jax.tree.map(lambda *z: sum(z) / len(z), *points)
    assert_trees_equal(config.eval_params(state, params), mean, atol=1e-6, rtol=1e-5)
    trained = jax.tree.map(lambda z, x: 0.1 * z + 0.9 * x, points[-1], mean)
    assert_trees_equal(params, trained, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"learning_rate": -1.0}, {"weight_decay": -0.1}, {"clip_norm": 0.0}], ids=repr
)
def test_optimizer_rejects_values_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        AdamW(**fields)
