"""The training loop: logging, evaluation, checkpoints and stop conditions."""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.train.loop import Diverged, Limits, TrainingLoop
from tests.train.small import make_experiment, make_session, random_batch


class Batches:
    """An endless input whose position is the number of batches taken."""

    def __init__(self, poison=None):
        self.taken, self.poison = 0, poison

    def __next__(self):
        self.taken += 1
        batch = random_batch(self.taken)
        return (
            batch._replace(weights=batch.weights * np.float32("nan")) if self.taken == self.poison else batch
        )

    def get_state(self):
        return {"taken": self.taken}


class Record:
    """Fake metric writer and checkpoint manager that records all calls in order."""

    def __init__(self):
        self.events = []

    def write(self, step, split, metrics):
        self.events.append((split, step, metrics))

    def save(self, step, state, data, metrics=None):
        assert int(state.step) == step
        self.events.append(("save", step, {"data": data, "metrics": metrics}))

    def has_metrics(self, step):
        return any(kind == "save" and s == step and saved["metrics"] for kind, s, saved in self.events)

    def wait(self):
        self.events.append(("wait", None, {}))

    def of(self, kind):
        return [step for k, step, _ in self.events if k == kind]


@pytest.fixture(scope="module")
def session():
    """Return a session that is compiled once for all tests of this module."""
    return make_session(make_experiment(steps=12, log_every=5, eval_every=4, checkpoint_every=6))


def train(
    session, limits=None, batches=None, start=None, log=lambda text: None, profile_dir="none", record=None
):
    record = record or Record()
    loop = TrainingLoop(
        session=session,
        batches=batches or Batches(),
        validation=[random_batch(100)],
        checkpoints=record,
        writer=record,
        limits=limits or Limits(),
        profile_dir=profile_dir,
        log=log,
    )
    return loop.run(start or session.new_state()), record


def test_run_logs_first_last_and_every_log_step(session):
    outcome, record = train(session)
    assert (outcome.reason, outcome.step) == ("done", 12)
    assert record.of("train") == [1, 5, 10, 12]
    assert record.of("eval") == [4, 8, 12]
    assert record.of("save") == [6, 12]
    assert record.events[-1][0] == "wait"
    for kind, step, metrics in record.events:
        if kind == "train":
            assert 0 <= metrics["input_wait"] <= 1
            assert metrics["tokens_per_second"] > 0
            assert metrics["model_flops_utilization"] > 0
            assert metrics["tokens"] == 8 * 16
            assert metrics["learning_rate"] == pytest.approx(1e-3 * step / 50)  # in warmup
            assert "leaf_norms" not in metrics


def test_run_evaluates_before_saving_the_metrics(session):
    outcome, record = train(session)
    order = [(kind, step) for kind, step, _ in record.events]
    assert order.index(("train", 12)) < order.index(("eval", 12)) < order.index(("save", 12))
    saves = {step: saved for kind, step, saved in record.events if kind == "save"}
    assert saves[6] == {"data": {"taken": 6}, "metrics": None}  # no evaluation was due
    assert saves[12] == {"data": {"taken": 12}, "metrics": outcome.metrics}


def test_delayed_metrics_are_logged_under_their_own_step(session):
    _, record = train(session)
    logged = {step: metrics["loss"] for kind, step, metrics in record.events if kind == "train"}
    state, batches = session.new_state(), Batches()
    for step in range(1, 13):
        state, metrics = session.train_step(state, session.to_devices(next(batches)))
        if step in logged:
            assert logged[step] == float(metrics["loss"])


def test_run_stops_at_limits(session):
    outcome, record = train(session, Limits(max_steps=7))
    assert (outcome.reason, outcome.step) == ("max_steps", 7)
    assert record.of("train") == [1, 5, 7]
    assert (record.of("eval"), record.of("save")) == ([4, 7], [6, 7])
    outcome, record = train(session, Limits(max_time=1e-9))
    assert (outcome.reason, outcome.step) == ("max_time", 1)
    assert record.of("eval") == record.of("save") == record.of("train") == [1]


def test_resume_from_state_repeats_bits(session):
    half, _ = train(session, Limits(max_steps=7))
    batches = Batches()
    batches.taken = 7
    outcome, record = train(session, start=jax.tree.map(jnp.copy, half.state), batches=batches)
    assert record.of("train") == [10, 12]
    straight, _ = train(session)
    for a, b in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(straight.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_run_at_its_end_only_evaluates(session):
    done, _ = train(session)
    batches = Batches()
    messages = []
    outcome, record = train(session, start=done.state, batches=batches, log=messages.append)
    assert (outcome.reason, outcome.step, batches.taken, messages) == ("done", 12, 0, [])
    assert record.of("train") == []
    assert set(outcome.metrics) == {"loss", "accuracy", "bits_per_byte"}


def test_nan_loss_raises_before_checkpoint(session):
    with pytest.raises(Diverged, match=r"^step 3: loss nan"):
        train(session, batches=Batches(poison=3))
    record = Record()
    with pytest.raises(Diverged, match=r"^step 6: loss nan"):
        train(session, batches=Batches(poison=6), record=record)
    assert record.of("save") == []  # the metrics of step 6 are checked before the save


def test_sigterm_saves_without_evaluation(session):
    class Signalling(Batches):
        def __next__(self):
            if self.taken == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    outcome, record = train(session, batches=Signalling())
    assert (outcome.reason, outcome.step) == ("signal", 3)
    assert [(kind, step) for kind, step, _ in record.events] == [
        ("train", 1),
        ("train", 3),
        ("save", 3),
        ("wait", None),
    ]


@pytest.mark.parametrize(("steps", "stop", "traced"), [((2, 4), None, "2 to 3"), ((6, 20), 7, "6 to 7")])
def test_profile_is_written_even_if_the_run_ends_within_it(session, tmp_path, steps, stop, traced):
    messages = []
    train(session, Limits(profile=steps, max_steps=stop), log=messages.append, profile_dir=str(tmp_path))
    expected = f"wrote a profiler trace of steps {traced} to {tmp_path}"
    assert messages == ["compiling the training step", expected]
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_compilation_is_logged_before_the_first_step(session):
    batches, said = Batches(), []
    train(session, Limits(max_steps=2), batches=batches, log=lambda text: said.append((text, batches.taken)))
    assert said == [("compiling the training step", 0)]


def test_input_wait_is_a_fraction_of_the_time():
    session = make_session(make_experiment(steps=4, eval_every=100, checkpoint_every=100))

    class Slow(Batches):
        def __next__(self):
            if self.taken >= 2:
                time.sleep(1.0)
            return super().__next__()

    _, record = train(session, batches=Slow())
    waits = [metrics["input_wait"] for kind, _, metrics in record.events if kind == "train"]
    assert all(0 <= wait <= 1 for wait in waits)
    assert max(waits) > 0.5
