"""The training loop: feed the step, log a step late, evaluate, save, and stop when told to."""

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grain
import jax
import numpy as np

from attnlab.data import Batch
from attnlab.train import flops, optimizers
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.session import Session
from attnlab.train.step import State


class Diverged(FloatingPointError):
    """The loss or a gradient is no longer finite."""


class Sink(Protocol):
    """What the loop tells its numbers to."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step."""


@dataclass(frozen=True)
class Limits:
    """Ends of this command, not of the run: the run goes on from there when started again.

    Attributes:
      max_steps: step to stop at; None is the run's own length.
      max_time: seconds of training to stop after; None is no limit.
      profile: steps of a profiler trace, from the first up to but not the second; None is none.
    """

    max_steps: int | None = None
    max_time: float | None = None
    profile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """Where training ended.

    Attributes:
      state: after the last step.
      step: its number.
      reason: "done", "max_steps", "max_time" or "signal".
      metrics: of the last evaluation.
    """

    state: State
    step: int
    reason: str
    metrics: dict[str, float]


def train(
    session: Session,
    batches: grain.DatasetIterator[Batch],
    validation: Iterable[Batch],
    checkpoints: Checkpoints,
    sink: Sink,
    start: State,
    limits: Limits,
    profile_dir: str,
    say: Callable[[str], None],
) -> Outcome:
    """Trains from `start` to the end of the run, or to a limit, and saves where it ends.

    Args:
      session: what to train and where.
      batches: this process's input, with `get_state`.
      validation: the batches of each evaluation.
      checkpoints: where to save.
      sink: takes metrics.
      start: the state to go on from.
      limits: when to stop before the end.
      profile_dir: where a profiler trace goes.
      say: takes lines for the person.

    Raises:
      Diverged: the loss or a gradient is not finite; the state is not saved.
    """
    config = session.experiment.train
    meter = Meter(session, int(start.step))
    last = min(config.steps, limits.max_steps or config.steps)
    state, step, reason, evaluated, saved = start, int(start.step), "done", {}, -1
    pending: tuple[int, dict] | None = None

    def settle(force: bool = False) -> None:
        nonlocal pending
        if pending is None:
            return
        number, metrics = pending
        pending = None
        metrics = jax.device_get(metrics)
        check_finite(number, metrics, session)
        meter.count(metrics)
        if number == 1 or number % config.log_every == 0 or force:
            sink.write(number, "train", meter.read(number, metrics))

    def evaluate_and_save(final: bool) -> None:
        nonlocal evaluated, saved
        settle(force=final)
        with meter.paused():
            due = final or step % config.eval_every == 0
            if due:
                evaluated = session.evaluate(session.eval_params(state), validation)
                if not checkpoints.measured(step):  # else a run that was at its end has its line already
                    sink.write(step, "eval", evaluated)
            if (final or step % config.checkpoint_every == 0) and saved != step:
                checkpoints.save(step, state, batches.get_state(), evaluated if due else None)
                saved = step

    if step < last:
        say("compiling the training step")
    with stop_on_signal() as signalled, Tracer(limits.profile, profile_dir, say) as tracer:
        while step < last:
            tracer.before(step + 1)
            with meter.waiting():
                batch = next(batches)
            with meter.dispatching():
                state, metrics = session.train_step(state, session.to_devices(batch))
            step += 1
            settle()
            pending = (step, metrics)
            tracer.after(step, metrics)
            if signalled.name:
                reason = "signal"
            elif limits.max_time is not None and meter.total() >= limits.max_time:
                reason = "max_time"
            if reason != "done":
                break
            if step < last and (step % config.eval_every == 0 or step % config.checkpoint_every == 0):
                evaluate_and_save(final=False)
        if reason == "signal":
            # The machine is about to go: save, and leave the evaluation to the next start.
            settle(force=True)
            checkpoints.save(step, state, batches.get_state())
        else:
            evaluate_and_save(final=True)
        checkpoints.wait()
    if reason == "done" and step < config.steps:
        reason = "max_steps"
    return Outcome(state, step, reason, evaluated)


def check_finite(step: int, metrics: dict[str, Any], session: Session) -> None:
    """Checks a step's loss and gradients.

    Raises:
      Diverged: naming the step and the first tensor, in the order of the parameters, that is not finite.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(session.abstract_state.params)]
    bad = [i for i, norm in enumerate(metrics["leaf_norms"]) if not np.isfinite(norm)]
    where = f"the gradient of {optimizers.parameter_name(paths[bad[0]])}" if bad else "the loss itself"
    raise Diverged(
        f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; "
        f"the first bad tensor is {where}"
    )


class Tracer:
    """A profiler trace of some steps, written also where the run ends within them."""

    def __init__(self, steps: tuple[int, int] | None, folder: str, say: Callable[[str], None]):
        self._steps, self._folder, self._say = steps or (0, 0), folder, say
        self._began: int | None = None
        self._last = 0

    def before(self, step: int) -> None:
        """Starts with the first of the steps."""
        if self._began is None and step in range(*self._steps):
            jax.profiler.start_trace(self._folder)
            self._began = step

    def after(self, step: int, metrics: Any) -> None:
        """Ends with the last of them, when the devices are done with it."""
        self._last = step
        if self._began is not None and step + 1 == self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._say(f"a trace of steps {self._began} to {self._last} is in {self._folder}")
        self._began, self._steps = None, (0, 0)

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._began is not None:
            self._stop()


@dataclass
class Signalled:
    """The name of the signal that asked to stop; empty while none did."""

    name: str = ""


@contextmanager
def stop_on_signal():
    """Turns SIGTERM into a wish to stop, looked at between steps."""
    seen = Signalled()

    def handle(number, _):
        seen.name = signal.Signals(number).name

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: the program that owns it decides
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Meter:
    """Speed between two readings, without the time of compiling, evaluating and saving."""

    session: Session
    step: int
    _started: float = field(default_factory=time.perf_counter)
    _tokens: float = 0.0
    _waited: float = 0.0
    _paused: float = 0.0
    _compiled: bool = False
    _origin: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        e = self.session.experiment
        counted = e.model.token_flops(self.session.tokenizer.vocab_size, e.data.sequence_length)
        self._flops_per_token = counted.training
        self._peak = flops.peak_flops(self.session.mesh.devices.flat[0]) * self.session.mesh.size

    @contextmanager
    def waiting(self):
        """Around the wait for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        """Around what is no training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @contextmanager
    def dispatching(self):
        """Around handing a step to the devices, which compiles it the first time."""
        start = time.perf_counter()
        yield
        if not self._compiled:
            self._compiled = True
            self._paused += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the start, everything included."""
        return time.perf_counter() - self._origin

    def count(self, metrics: dict[str, Any]) -> None:
        """Takes a step's tokens."""
        self._tokens += float(metrics["tokens"])

    def read(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """A step's metrics with the speed since the last reading; starts the next stretch."""
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        tokens_per_second = self._tokens / seconds
        model_flops = tokens_per_second * self._flops_per_token
        e = self.session.experiment
        rate = optimizers.learning_rate(e.optimizer, e.train.steps)(step - 1)
        scalars = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        if not scalars["bytes"]:
            del scalars["bits_per_byte"]  # the targets stand for no text
        self._started, self._tokens, self._paused = now, 0.0, 0.0
        waited, self._waited = self._waited, 0.0
        return scalars | {
            "learning_rate": float(rate),
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": model_flops,
            "model_flops_utilization": model_flops / self._peak,
            "input_wait": min(1.0, waited / seconds),
        }
