"""The training step: accumulation, clipping, EMA, skipped updates, dropout and purity."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers.linear import Dtypes
from attnlab.train import SGD, Adafactor, AdamW, Constant, Lion, Muon, ScheduleFree, SpikeSkip
from attnlab.train.loop import divergence
from attnlab.train.optimizers import widened
from attnlab.train.step import LossHistory, make_train_step
from tests.train.small import make_experiment, make_session, random_batch


def run_step(session, state, batch):
    """Run one step on a copy of the state, since the step donates it."""
    return session.train_step(jax.tree.map(jnp.copy, state), session.to_devices(batch))


def leaves(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("optimizer", [AdamW(epsilon=1e-3), SGD()], ids=["AdamW", "SGD"])
def test_gradient_accumulation_equals_the_whole_batch(optimizer):
    # AdamW's epsilon is above the rounding noise, which would dominate gradients close to zero.
    batch = random_batch(uneven=True)
    whole, parts = (
        make_session(make_experiment(optimizer=optimizer, microbatches=count)) for count in (1, 4)
    )
    start = whole.new_state()
    one, metrics_one = run_step(whole, start, batch)
    four, metrics_four = run_step(parts, start, batch)
    np.testing.assert_allclose(leaves(four.params), leaves(one.params), atol=1e-6, rtol=0)
    for name in ("loss", "accuracy", "bits_per_byte", "grad_norm", "tokens"):
        np.testing.assert_allclose(metrics_four[name], metrics_one[name], rtol=1e-5)


def test_clipping_scales_the_gradient_to_the_global_norm():
    plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": Constant(), "learning_rate": 1.0}
    free, clipped = (
        make_session(make_experiment(optimizer=SGD(clip_norm=norm, **plain))) for norm in (None, 0.01)
    )
    start, batch = free.new_state(), random_batch()
    one, metrics = run_step(free, start, batch)
    two, same = run_step(clipped, start, batch)
    assert float(metrics["grad_norm"]) > 0.02
    np.testing.assert_allclose(same["grad_norm"], metrics["grad_norm"], rtol=1e-6)  # before clipping
    np.testing.assert_allclose(same["update_norm"], 0.01, rtol=1e-5)
    free_update, clipped_update = (leaves(x.params) - leaves(start.params) for x in (one, two))
    np.testing.assert_allclose(clipped_update, free_update * 0.01 / float(metrics["grad_norm"]), atol=1e-7)


def test_ema_follows_the_parameters():
    session = make_session(make_experiment(ema=0.5))
    state, batch = session.new_state(), random_batch()
    expected = leaves(state.params)
    for step in range(6):
        state, _ = run_step(session, state, batch)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * leaves(state.params)
    np.testing.assert_allclose(leaves(state.ema), expected, atol=1e-6)
    assert session.eval_params(state) is state.ema


def test_nonfinite_update_is_skipped_and_reported():
    session = make_session(make_experiment(ema=0.9))
    state = session.new_state()
    path = ("layers", "periods", "block0", "feed_forward", "up", "kernel")
    poisoned = jax.tree.map(jnp.copy, state.params)
    here = poisoned
    for name in path[:-1]:
        here = here[name]
    values = np.array(here[path[-1]])
    values[0, 0, 0] = np.nan
    here[path[-1]] = jax.device_put(values, here[path[-1]].sharding)
    state = dataclasses.replace(state, params=poisoned)
    after, metrics = run_step(session, state, random_batch())
    np.testing.assert_array_equal(leaves(after.params), leaves(state.params))
    np.testing.assert_array_equal(leaves(after.opt_state), leaves(state.opt_state))
    np.testing.assert_array_equal(leaves(after.ema), leaves(state.ema))
    assert (int(after.step), float(metrics["skipped"])) == (1, 1.0)
    assert not metrics["is_finite"]
    error = str(divergence(7, jax.device_get(metrics), session))
    assert re.match("step 7: loss nan.*the gradient of embedding/table$", error)


def test_diverged_names_the_first_nonfinite_tensor():
    session = make_session(make_experiment())
    count = len(jax.tree.leaves(session.abstract_state.params))
    norms = np.ones(count)
    norms[[2, 4]] = np.inf, np.nan
    metrics = {"loss": np.float32(3.5), "grad_norm": np.float32("nan"), "leaf_norms": norms}
    error = str(divergence(3, metrics, session))
    assert re.match("step 3: loss 3.5, gradient norm nan.*attention/out/kernel", error)
    of_loss = metrics | {"loss": np.float32("inf"), "leaf_norms": np.ones(count)}
    assert "the loss itself" in str(divergence(3, of_loss, session))


def test_spike_is_skipped_and_excluded_from_history():
    session = make_session(make_experiment(spike_skip=SpikeSkip(sigmas=3.0, window=4)))
    state, batch = session.new_state(), random_batch()
    known = LossHistory(jnp.float32(1.0), jnp.float32(0.01), jnp.float32(4))
    after, metrics = run_step(
        session, dataclasses.replace(state, history=known), batch
    )  # a loss of about 5.5
    assert float(metrics["skipped"]) == 1.0
    np.testing.assert_array_equal(leaves(after.params), leaves(state.params))
    assert jax.device_get(after.history) == known
    new = dataclasses.replace(known, count=jnp.float32(3))  # fewer steps than the window
    after, metrics = run_step(session, dataclasses.replace(state, history=new), batch)
    assert float(metrics["skipped"]) == 0.0
    assert float(after.history.count) == 4.0
    assert float(after.history.mean) == pytest.approx(1 + (float(metrics["loss"]) - 1) / 4, rel=1e-5)


def test_dropout_differs_by_step_and_by_microbatch():
    session = make_session(make_experiment(dropout=0.5))
    state, batch = session.new_state(), random_batch()
    losses = [
        float(run_step(session, dataclasses.replace(state, step=jnp.int32(step)), batch)[1]["loss"])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    # Eight equal rows: with the same key, both microbatches would have equal sums.
    same = batch.map(lambda x: np.repeat(x[:1], 8, axis=0))
    halves = make_session(make_experiment(dropout=0.5, microbatches=2))
    one_half = make_session(make_experiment(dropout=0.5, batch_size=4))
    four = same.map(lambda x: x[:4])
    loss = float(run_step(halves, state, same)[1]["loss"])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), 0)
    with jax.set_mesh(one_half.mesh):
        four = one_half.to_devices(four)
        loss_of = _loss_function(one_half)
        first, second = (float(loss_of(state.params, four, jax.random.fold_in(key, i))) for i in range(2))
    assert first != second
    assert loss == pytest.approx((first + second) / 2, rel=1e-5)


def _loss_function(session):
    """Return the loss of a batch as a function of the parameters, the batch and the dropout key."""

    @jax.jit
    def loss(params, batch, key):
        terms = session.model.apply(
            {"params": params}, batch.tokens, batch.targets, batch.segments, batch.positions,
            deterministic=False, rngs={"dropout": key}, method="loss_terms",
        )  # fmt: skip
        return jnp.mean(terms.lse - terms.target_logit)

    return loss


def test_step_is_deterministic():
    session = make_session(make_experiment(dropout=0.1, ema=0.9, spike_skip=SpikeSkip()))
    state, batch = session.new_state(), random_batch()
    (one, metrics), (two, again) = (run_step(session, state, batch) for _ in range(2))
    for a, b in zip(jax.tree.leaves((one, metrics)), jax.tree.leaves((two, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_evaluate_weights_tokens_equally_across_batches():
    session = make_session(make_experiment())
    params = session.new_state().params
    batches = [random_batch(seed) for seed in range(2)]
    batches[1] = batches[1]._replace(weights=batches[1].weights * (np.arange(16)[None] < 2))
    sums = [jax.device_get(session.eval_step(params, session.to_devices(b))) for b in batches]
    metrics = session.evaluate(params, batches)
    nats, tokens = (sum(float(s[name]) for s in sums) for name in ("nats", "tokens"))
    assert tokens == 8 * 16 + 8 * 2
    assert metrics["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert set(metrics) == {"loss", "accuracy", "bits_per_byte"}


HALF = {"dtypes": Dtypes(param="bfloat16")}


def float_dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(), Lion(), Adafactor(momentum=0.9, min_dim_size_to_factor=8), Muon(), SGD(), ScheduleFree()],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_state_of_bfloat16_parameters_is_float32(optimizer):
    train = {"ema": 0.9, "microbatches": 2, "spike_skip": SpikeSkip()}
    with jax.enable_x64(True):  # which also widens what depends on the default dtype
        session = make_session(make_experiment(optimizer=optimizer, model=HALF, **train))
        step = make_train_step(session.model, session.experiment, session.optimizer)
        before = session.abstract_state
        with jax.set_mesh(session.mesh):
            after, metrics = jax.eval_shape(step, before, session.abstract_batch)
    assert float_dtypes(before.params) == {jnp.dtype("bfloat16")}
    assert all(dtype.itemsize >= 4 for dtype in float_dtypes((before.opt_state, before.ema)))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
    assert metrics["loss"].shape == ()


def test_bfloat16_parameters_accumulate_gradients_and_ema_in_float32():
    sgd = SGD(momentum=0.5, weight_decay=0.0, clip_norm=None)
    options = {"optimizer": sgd, "batch_size": 64, "ema": 0.9}
    half = make_session(make_experiment(model=HALF, microbatches=64, **options))
    exact = make_session(make_experiment(**options))
    start, batch = half.new_state(), random_batch(rows=64)
    # The reference has the same parameter values in float32, and one gradient of the whole batch.
    after, _ = run_step(half, start, batch)
    reference, _ = run_step(exact, exact.new_state(widened(start.params)), batch)
    gradient, expected = leaves(after.opt_state[0].trace), leaves(reference.opt_state[0].trace)
    assert np.linalg.norm(gradient - expected) < 2e-3 * np.linalg.norm(expected)
    decay = 0.1  # of the first step, (1 + 0) / (10 + 0)
    average = decay * leaves(start.params) + (1 - decay) * leaves(after.params)
    np.testing.assert_allclose(leaves(after.ema), average, rtol=1e-6)
    assert float_dtypes(half.eval_params(after)) == {jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def sessions():
    """Return sessions of 1 and of 4 microbatches, without weight decay."""
    options = {"optimizer": SGD(weight_decay=0.0), "spike_skip": SpikeSkip()}
    return [make_session(make_experiment(microbatches=count, **options)) for count in (1, 4)]


def test_batch_without_weighted_targets_gives_no_gradient(sessions):
    batch = random_batch()
    for session in sessions:
        state = session.new_state()
        after, metrics = run_step(session, state, batch._replace(weights=batch.weights * 0))
        assert metrics["is_finite"]
        assert [float(metrics[name]) for name in ("loss", "accuracy", "grad_norm", "tokens")] == [0] * 4
        np.testing.assert_array_equal(leaves(after.params), leaves(state.params))
        assert float(after.history.count) == 0.0  # its loss says nothing about spikes


def test_microbatch_without_weighted_targets_changes_nothing(sessions):
    batch, (one, four) = random_batch(), sessions
    weights = batch.weights.copy()
    weights[[1, 5]] = 0  # the rows of microbatch 1
    start = one.new_state()
    whole, expected = run_step(one, start, batch._replace(weights=weights))
    parts, metrics = run_step(four, start, batch._replace(weights=weights))
    np.testing.assert_allclose(leaves(parts.params), leaves(whole.params), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    # The loss is a weighted mean, so it and its gradient do not depend on the scale of the weights.
    small, scaled = run_step(one, start, batch._replace(weights=weights / 1024))
    np.testing.assert_allclose(leaves(small.params), leaves(whole.params), atol=1e-7)
    np.testing.assert_allclose(scaled["loss"], expected["loss"], rtol=1e-6)


def test_input_tokens_are_those_without_padding(sessions):
    session, batch = sessions[0], random_batch(uneven=True)
    segments = (np.arange(16) < np.arange(1, 9)[:, None]).astype(np.int32)  # rows of 1 to 8 tokens
    _, metrics = run_step(session, session.new_state(), batch._replace(segments=segments))
    assert int(metrics["input_tokens"]) == sum(range(1, 9))
