"""The training loop: logging, evaluation, checkpoints and stop conditions."""

import copy
import dataclasses
import errno
import gc
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import StorageError
from attnlab.train import digests, flops, loop, slow_steps
from attnlab.train.checkpoints import Checkpoints
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
    """Fake metric writer and checkpoint manager that records all calls in order.

    With real checkpoints, it is the metric writer alone.
    """

    def __init__(self, checkpoints=None):
        self.events, self.checkpoints = [], checkpoints or self

    def write(self, step, split, metrics):
        self.events.append((split, step, metrics))

    def save(self, step, state, data, metrics=None):
        assert int(state.step) == step
        self.events.append(("save", step, {"data": data, "metrics": metrics}))

    def has_metrics(self, step):
        return any(kind == "save" and s == step and saved["metrics"] for kind, s, saved in self.events)

    def failed(self):
        return False

    def wait(self):
        self.events.append(("wait", None, {}))

    def of(self, kind):
        return [step for k, step, _ in self.events if k == kind]


@pytest.fixture(scope="module")
def session():
    """Return a session that is compiled once for all tests of this module."""
    return make_session(make_experiment(steps=12, log_every=5, eval_every=4, checkpoint_every=6))


def train(
    session,
    limits=None,
    batches=None,
    start=None,
    log=lambda text: None,
    profile_dir="none",
    record=None,
    validation=None,
):
    record = record or Record()
    training = TrainingLoop(
        session=session,
        batches=batches or Batches(),
        validation=validation or [random_batch(100)],
        checkpoints=record.checkpoints,
        writer=record,
        limits=limits or Limits(),
        profile_dir=profile_dir,
        log=log,
    )
    return training.run(start or session.new_state()), record


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
            shares = [metrics[name] for name in metrics if name.endswith("_share")]
            assert 0 < metrics["goodput"] < 1
            assert sum(shares) + metrics["goodput"] == pytest.approx(1)
            assert "device_memory_bytes" not in metrics  # a CPU does not count it


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


def test_garbage_collection_is_paused_in_the_first_step_alone(session, monkeypatch):
    step, enabled = session.train_step, []

    def recorded(state, batch):
        enabled.append(gc.isenabled())
        return step(state, batch)

    monkeypatch.setitem(vars(session), "train_step", recorded)
    train(session, Limits(max_steps=3))
    assert enabled == [False, True, True] and gc.isenabled()


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


class Votes:
    """The decision of process 0 in a job: one call late."""

    def __init__(self):
        self.previous = ""

    def __call__(self, reason, after=None):
        result, self.previous = self.previous, reason
        return result


@pytest.mark.parametrize(
    ("decision", "process", "saved"),
    [
        (loop.Decision, 0, [4, 6, 10, 12]),
        (Votes, 0, [4, 6, 11, 12]),  # the evaluation of step 4 has the next call
        (Votes, 1, [6, 12]),  # process 0 decides
    ],
)
def test_checkpoints_by_time_count_from_the_last_one(session, monkeypatch, decision, process, saved):
    """A step takes 30 seconds; a checkpoint is due every sixth step, and after two minutes."""
    clock = SimpleNamespace(now=0.0)

    class Slow(Batches):
        def __next__(self):
            clock.now += 30
            return super().__next__()

    timed = copy.copy(session)  # with its compiled steps
    experiment = session.experiment
    train_config = dataclasses.replace(experiment.train, checkpoint_minutes=2.0)
    object.__setattr__(timed, "experiment", dataclasses.replace(experiment, train=train_config))
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(loop, "Decision", decision)
    monkeypatch.setattr(loop, "is_main_process", lambda: process == 0)
    _, record = train(timed, batches=Slow())
    assert record.of("save") == saved


def test_failed_save_is_repeated_with_the_current_state(session, tmp_path, monkeypatch):
    """The save of step 6 fails in the background, and so does its first repetition."""
    write, lines, steps = digests.write, [], []

    def fail(folder, *arguments):
        steps.append(int(folder.name.removesuffix(".tmp")))
        if len(steps) < 3:
            raise OSError(errno.EIO, "Input/output error")
        write(folder, *arguments)

    monkeypatch.setattr(digests, "write", fail)
    monkeypatch.setattr(loop, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        train(session, log=lines.append, record=Record(checkpoints))
        assert checkpoints.steps() == sorted({*steps[2:], 12})
    assert steps[0] == 6 and steps == sorted(steps)
    failed = [line for line in lines if line.startswith("warning: ")]
    assert [line.split()[2] for line in failed] == [str(step) for step in steps[:2]]
    assert all("Input/output error" in line and "trying again in 0 s" in line for line in failed)


def test_storage_that_keeps_failing_ends_the_run(session, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write", fail)
    monkeypatch.setattr(loop, "RETRY_DELAYS", (0.0, 0.0))
    lines = []
    with (
        pytest.raises(StorageError, match="No space left on device"),
        Checkpoints(tmp_path, 9) as checkpoints,
    ):
        train(session, log=lines.append, record=Record(checkpoints))
    assert len([line for line in lines if line.startswith("warning: ")]) == 2
    assert not list((tmp_path / "checkpoints").iterdir())


def test_nan_loss_raises_before_checkpoint(session):
    with pytest.raises(Diverged, match=r"^step 3: loss nan"):
        train(session, batches=Batches(poison=3))
    record = Record()
    with pytest.raises(Diverged, match=r"^step 6: loss nan"):
        train(session, batches=Batches(poison=6), record=record)
    assert record.of("save") == []  # the metrics of step 6 are checked before the save


class Signalling(Batches):
    """Batches that raise signals before the third one."""

    def __init__(self, *signals):
        super().__init__()
        self.signals = signals

    def __next__(self):
        if self.taken == 2:
            for number in self.signals:
                signal.raise_signal(number)
        return super().__next__()


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)],
)
def test_signal_saves_without_evaluation(session, signals):
    outcome, record = train(session, batches=Signalling(*signals))
    assert (outcome.reason, outcome.step, outcome.signal) == ("signal", 3, signals[0].name)
    assert [(kind, step) for kind, step, _ in record.events] == [
        ("train", 1),
        ("train", 3),
        ("save", 3),
        ("wait", None),
    ]


def test_second_interrupt_aborts_without_checkpoint(session):
    record, before = Record(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(session, batches=Signalling(signal.SIGTERM, signal.SIGINT), record=record)
    assert record.of("save") == []
    assert signal.getsignal(signal.SIGINT) is before


class Validation:
    """Two batches; a signal arrives while the second one of the chosen evaluation is read."""

    def __init__(self, number, evaluation):
        self.number, self.left, self.read = number, evaluation, 0

    def __iter__(self):
        self.left -= 1
        for seed in (100, 101, 102):
            if seed == 101 and self.left == 0:
                signal.raise_signal(self.number)
            self.read += 1
            yield random_batch(seed)


@pytest.mark.parametrize(("number", "evaluation", "step"), [(signal.SIGTERM, 2, 8), (signal.SIGUSR1, 3, 12)])
def test_signal_ends_an_evaluation_that_the_resumed_run_repeats(session, number, evaluation, step):
    validation, batches, record = Validation(number, evaluation), Batches(), Record()
    outcome, _ = train(session, batches=batches, validation=validation, record=record)
    assert (outcome.reason, outcome.step, outcome.signal) == ("signal", step, number.name)
    assert validation.read == 3 * evaluation - 2 + 1  # the batch in the device's queue, and no other
    assert record.of("eval") == [4, 8][: evaluation - 1]
    assert record.of("save")[-1] == step
    train(session, start=outcome.state, batches=batches, validation=Validation(number, 0), record=record)
    _, straight = train(session, validation=Validation(number, 0))
    assert [e for e in record.events if e[0] == "eval"] == [e for e in straight.events if e[0] == "eval"]


def test_signal_in_the_last_evaluation_is_reported(session):
    class Interrupted(Record):
        def write(self, step, split, metrics):
            super().write(step, split, metrics)
            if (step, split) == (12, "eval"):
                signal.raise_signal(signal.SIGTERM)

    outcome, record = train(session, record=Interrupted())
    assert (outcome.reason, outcome.step) == ("signal", 12)
    assert record.of("save") == [6, 12]


def test_compilation_is_logged_before_the_first_step(session):
    batches, said = Batches(), []
    train(session, Limits(max_steps=2), batches=batches, log=lambda text: said.append((text, batches.taken)))
    assert said == [("compiling the training step", 0)]


def test_wait_for_input_is_measured_and_its_slow_step_named(session, monkeypatch):
    class Slow(Batches):
        def __next__(self):
            if self.taken == 10:
                time.sleep(1.5)
            return super().__next__()

    monkeypatch.setattr(slow_steps, "FACTOR", 1.0)  # on a busy machine the others may be slow too
    monkeypatch.setattr(slow_steps, "EXCESS", 0.9)
    lines: list[str] = []
    _, record = train(session, batches=Slow(), log=lines.append)
    rows = [metrics for kind, _, metrics in record.events if kind == "train"]
    assert all(0 <= row["input_wait"] <= 1 for row in rows)
    assert max(row["input_wait"] for row in rows) > 0.3
    assert rows[-1]["input_share"] > rows[0]["input_share"]
    assert rows[-1]["slow_steps"] >= 1
    assert any(line.startswith("step 11 was slow: 1.") and line.endswith("for input") for line in lines)
