"""The loop: when it logs, evaluates, saves and stops."""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.train.loop import Diverged, Limits, TrainingLoop
from tests.train.small import experiment, random_batch, session


class Batches:
    """An endless input whose position is how many were taken."""

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
    """Stands in for sink and checkpoints, and keeps all that it is told, in order."""

    def __init__(self):
        self.events = []

    def write(self, step, split, metrics):
        self.events.append((split, step, metrics))

    def save(self, step, state, data, metrics=None):
        assert int(state.step) == step
        self.events.append(("save", step, {"data": data, "metrics": metrics}))

    def has_metrics(self, step):
        return any(kind == "save" and s == step and told["metrics"] for kind, s, told in self.events)

    def wait(self):
        self.events.append(("wait", None, {}))

    def of(self, kind):
        return [step for k, step, _ in self.events if k == kind]


@pytest.fixture(scope="module")
def made():
    """A session compiled once; the loop reads its lengths from the experiment beside it."""
    return session(experiment(steps=12, log_every=5, eval_every=4, checkpoint_every=6))


def train(
    made, limits=None, batches=None, start=None, log=lambda text: None, profile_dir="none", record=None
):
    record = record or Record()
    loop = TrainingLoop(
        session=made,
        batches=batches or Batches(),
        validation=[random_batch(100)],
        checkpoints=record,
        writer=record,
        limits=limits or Limits(),
        profile_dir=profile_dir,
        log=log,
    )
    return loop.run(start or made.new_state()), record


def test_every_log_step_has_its_line_first_and_last_too(made):
    outcome, record = train(made)
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
            assert metrics["learning_rate"] == pytest.approx(1e-3 * step / 50)  # still rising
            assert "leaf_norms" not in metrics


def test_evaluation_comes_before_the_save_that_it_is_kept_with(made):
    outcome, record = train(made)
    order = [(kind, step) for kind, step, _ in record.events]
    assert order.index(("train", 12)) < order.index(("eval", 12)) < order.index(("save", 12))
    saves = {step: told for kind, step, told in record.events if kind == "save"}
    assert saves[6] == {"data": {"taken": 6}, "metrics": None}  # no evaluation was due there
    assert saves[12] == {"data": {"taken": 12}, "metrics": outcome.metrics}


def test_what_is_logged_is_that_step_though_it_is_read_later(made):
    _, record = train(made)
    logged = {step: metrics["loss"] for kind, step, metrics in record.events if kind == "train"}
    state, batches = made.new_state(), Batches()
    for step in range(1, 13):
        state, metrics = made.train_step(state, made.to_devices(next(batches)))
        if step in logged:
            assert logged[step] == float(metrics["loss"])


def test_limits(made):
    outcome, record = train(made, Limits(max_steps=7))
    assert (outcome.reason, outcome.step) == ("max_steps", 7)
    assert record.of("train") == [1, 5, 7]
    assert (record.of("eval"), record.of("save")) == ([4, 7], [6, 7])
    outcome, record = train(made, Limits(max_time=1e-9))
    assert (outcome.reason, outcome.step) == ("max_time", 1)
    assert record.of("eval") == record.of("save") == record.of("train") == [1]


def test_goes_on_from_a_state(made):
    half, _ = train(made, Limits(max_steps=7))
    batches = Batches()
    batches.taken = 7
    outcome, record = train(made, start=jax.tree.map(jnp.copy, half.state), batches=batches)
    assert record.of("train") == [10, 12]
    straight, _ = train(made)
    for a, b in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(straight.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_at_its_end_has_nothing_to_do(made):
    done, _ = train(made)
    batches = Batches()
    said = []
    outcome, record = train(made, start=done.state, batches=batches, log=said.append)
    assert (outcome.reason, outcome.step, batches.taken, said) == ("done", 12, 0, [])
    assert record.of("train") == []
    assert set(outcome.metrics) == {"loss", "accuracy", "bits_per_byte"}


def test_a_loss_that_is_no_number_stops_before_it_is_saved(made):
    with pytest.raises(Diverged, match=r"^step 3: loss nan"):
        train(made, batches=Batches(poison=3))
    record = Record()
    with pytest.raises(Diverged, match=r"^step 6: loss nan"):
        train(made, batches=Batches(poison=6), record=record)
    assert record.of("save") == []  # the step of the save is looked at first


def test_sigterm_saves_without_evaluating(made):
    class Signalling(Batches):
        def __next__(self):
            if self.taken == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    outcome, record = train(made, batches=Signalling())
    assert (outcome.reason, outcome.step) == ("signal", 3)
    assert [(kind, step) for kind, step, _ in record.events] == [
        ("train", 1),
        ("train", 3),
        ("save", 3),
        ("wait", None),
    ]


@pytest.mark.parametrize(("steps", "stop", "told"), [((2, 4), None, "2 to 3"), ((6, 20), 7, "6 to 7")])
def test_a_trace_is_written_also_where_the_run_ends_within_it(made, tmp_path, steps, stop, told):
    said = []
    train(made, Limits(profile=steps, max_steps=stop), log=said.append, profile_dir=str(tmp_path))
    assert said == ["compiling the training step", f"wrote a profiler trace of steps {told} to {tmp_path}"]
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_compiling_is_announced_before_the_first_step(made):
    batches, said = Batches(), []
    train(made, Limits(max_steps=2), batches=batches, log=lambda text: said.append((text, batches.taken)))
    assert said == [("compiling the training step", 0)]


def test_the_wait_for_input_is_a_share_of_the_time():
    made = session(experiment(steps=4, eval_every=100, checkpoint_every=100))

    class Slow(Batches):
        def __next__(self):
            if self.taken >= 2:
                time.sleep(1.0)
            return super().__next__()

    _, record = train(made, batches=Slow())
    waits = [metrics["input_wait"] for kind, _, metrics in record.events if kind == "train"]
    assert all(0 <= wait <= 1 for wait in waits)
    assert max(waits) > 0.5
