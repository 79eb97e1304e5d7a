"""The training loop: training steps, metrics, evaluations, checkpoints and stop conditions.

The metrics of a step are read one step later, so that the device never waits for the host.
"""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from attnlab.data import Batch
from attnlab.layers.parameters import parameter_name
from attnlab.paths import is_remote, write_atomically
from attnlab.train import flops, optimizers
from attnlab.train.checkpoints import Checkpoints
from attnlab.train.metrics import MetricWriter
from attnlab.train.session import Session
from attnlab.train.step import TrainState


class Diverged(FloatingPointError):
    """The loss or a gradient is not finite."""


@dataclass(frozen=True)
class Limits:
    """Limits of one process; the same command resumes the run from there.

    Attributes:
      max_steps: step to stop at; None trains to the end of the run.
      max_time: seconds of training after which to stop; None disables this limit.
      profile: half-open range of steps (start, stop) to trace with the profiler; None disables it.
    """

    max_steps: int | None = None
    max_time: float | None = None
    profile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of `TrainingLoop.run`.

    Attributes:
      state: the state after the last step.
      step: the number of the last step.
      reason: why training ended: "done", "max_steps", "max_time" or "signal".
      metrics: the metrics of the last evaluation.
    """

    state: TrainState
    step: int
    reason: str
    metrics: dict[str, float]


@dataclass(kw_only=True)
class TrainingLoop:
    """Trains the experiment of a session, with evaluations, checkpoints and metrics.

    Attributes:
      session: the experiment on its mesh.
      batches: iterator over this process's part of the training batches, with `get_state`.
      validation: the batches of each evaluation.
      checkpoints: the checkpoint manager.
      writer: receives the metrics.
      limits: conditions to stop before the end of the run.
      profile_dir: folder of the profiler trace.
      log: called with each message for the user.
    """

    session: Session
    batches: grain.DatasetIterator[Batch]
    validation: Iterable[Batch]
    checkpoints: Checkpoints
    writer: MetricWriter
    limits: Limits = Limits()
    profile_dir: str
    log: Callable[[str], None] = print

    def run(self, state: TrainState) -> Outcome:
        """Train from `state` to the end of the run or to a limit, and save a checkpoint there.

        `state` is donated. On SIGTERM (preemption) the current step is finished and a checkpoint is
        written without an evaluation.

        Raises:
          Diverged: the loss or a gradient is not finite; the state is not saved.
        """
        config = self.session.experiment.train
        last = min(config.steps, self.limits.max_steps or config.steps)
        self._state, self._step = state, int(state.step)
        self._meter = Meter(self.session, self._step)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._eval_metrics: dict[str, float] = {}
        self._saved_step = -1
        reason = "done"
        if self._step < last:
            self.log("compiling the training step")
        with stop_on_signal() as signalled, Tracer(self.limits.profile, self.profile_dir, self.log) as tracer:
            while self._step < last:
                self._train_one_step(tracer)
                if signalled.name:
                    reason = "signal"
                    break
                if self.limits.max_time is not None and self._meter.total() >= self.limits.max_time:
                    reason = "max_time"
                    break
                if self._step < last:
                    self._evaluate_and_save(final=False)
            if reason == "signal":
                # The machine is being preempted: save now, and evaluate after the run resumes.
                self._flush_pending_metrics(force=True)
                self.checkpoints.save(self._step, self._state, self.batches.get_state())
            else:
                self._evaluate_and_save(final=True)
            self.checkpoints.wait()
        if reason == "done" and self._step < config.steps:
            reason = "max_steps"
        return Outcome(self._state, self._step, reason, self._eval_metrics)

    def _train_one_step(self, tracer: "Tracer") -> None:
        tracer.before(self._step + 1)
        with self._meter.waiting():
            batch = next(self.batches)
        with self._meter.dispatching():
            self._state, metrics = self.session.train_step(self._state, self.session.to_devices(batch))
        self._step += 1
        # The metrics of the previous step are ready by now, so the device never waits for the host.
        self._flush_pending_metrics()
        self._pending = (self._step, metrics)
        tracer.after(self._step, metrics)

    def _flush_pending_metrics(self, force: bool = False) -> None:
        """Check the pending metrics of the last step, and write them if a line is due."""
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        metrics = jax.device_get(device_metrics)
        check_finite(step, metrics, self.session)
        self._meter.count(metrics)
        if step == 1 or step % self.session.experiment.train.log_every == 0 or force:
            self.writer.write(step, "train", self._meter.read(step, metrics))

    def _evaluate_and_save(self, final: bool) -> None:
        """Evaluate and save a checkpoint where this step is due; always both if `final`."""
        config, step = self.session.experiment.train, self._step
        evaluate = final or step % config.eval_every == 0
        save = final or step % config.checkpoint_every == 0
        if not (evaluate or save):
            return
        self._flush_pending_metrics(force=final)
        with self._meter.paused():
            if evaluate:
                params = self.session.eval_params(self._state)
                self._eval_metrics = self.session.evaluate(params, self.validation)
                if not self.checkpoints.has_metrics(step):  # otherwise the line is already written
                    self.writer.write(step, "eval", self._eval_metrics)
            if save and self._saved_step != step:
                metrics = self._eval_metrics if evaluate else None
                self.checkpoints.save(step, self._state, self.batches.get_state(), metrics)
                self._saved_step = step


def check_finite(step: int, metrics: dict[str, Any], session: Session) -> None:
    """Check that the loss and all gradients of a step are finite.

    Raises:
      Diverged: with the step and the first non-finite gradient, in the order of the parameters.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(session.abstract_state.params)]
    non_finite = [i for i, norm in enumerate(metrics["leaf_norms"]) if not np.isfinite(norm)]
    where = f"the gradient of {parameter_name(paths[non_finite[0]])}" if non_finite else "the loss itself"
    raise Diverged(
        f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; "
        f"the first non-finite tensor is {where}"
    )


class Tracer:
    """Profiler trace of a range of steps, also written if training ends within the range."""

    def __init__(self, steps: tuple[int, int] | None, folder: str, log: Callable[[str], None]):
        self._steps, self._folder, self._log = steps or (0, 0), folder, log
        self._began: int | None = None
        self._last, self._local = 0, folder

    def before(self, step: int) -> None:
        """Start the trace at the first step of the range."""
        if self._began is None and step in range(*self._steps):
            # XLA writes only local files; a trace for a bucket is copied there when it stops.
            self._local = tempfile.mkdtemp() if is_remote(self._folder) else self._folder
            jax.profiler.start_trace(self._local)
            self._began = step

    def after(self, step: int, metrics: Any) -> None:
        """Stop the trace after the last step of the range, once the devices have finished it."""
        self._last = step
        if self._began is not None and step + 1 == self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        if self._local != self._folder:
            for file in filter(Path.is_file, Path(self._local).rglob("*")):
                target = epath.Path(self._folder) / str(file.relative_to(self._local))
                write_atomically(target, file.read_bytes())
            shutil.rmtree(self._local)
        self._log(f"wrote a profiler trace of steps {self._began} to {self._last} to {self._folder}")
        self._began, self._steps = None, (0, 0)

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._began is not None:
            self._stop()


@dataclass
class StopRequest:
    """The name of the signal that requested a stop; empty if there was none."""

    name: str = ""


@contextmanager
def stop_on_signal():
    """Record SIGTERM in the yielded `StopRequest`, which the loop checks between steps."""
    request = StopRequest()

    def handle(number, _):
        request.name = signal.Signals(number).name

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # only the main thread may set signal handlers
        yield request
        return
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Meter:
    """Training speed since the last reading, excluding compilation, evaluation and saving."""

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
        model_flops = e.model.token_flops(self.session.tokenizer.vocab_size, e.data.sequence_length)
        self._flops_per_token = model_flops.training
        self._peak = flops.peak_flops(self.session.mesh.devices.flat[0]) * self.session.mesh.size

    @contextmanager
    def waiting(self):
        """Measure the time spent waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        """Exclude the enclosed time from the training speed."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @contextmanager
    def dispatching(self):
        """Enclose the dispatch of a step; the first one compiles, and its time is excluded."""
        start = time.perf_counter()
        yield
        if not self._compiled:
            self._compiled = True
            self._paused += time.perf_counter() - start

    def total(self) -> float:
        """Return the seconds since the start, including compilation, evaluation and saving."""
        return time.perf_counter() - self._origin

    def count(self, metrics: dict[str, Any]) -> None:
        """Add the tokens of a step."""
        self._tokens += float(metrics["tokens"])

    def read(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Return the scalar metrics of a step with the training speed, and reset the timers."""
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        tokens_per_second = self._tokens / seconds
        model_flops = tokens_per_second * self._flops_per_token
        e = self.session.experiment
        rate = optimizers.learning_rate(e.optimizer, e.train.steps)(step - 1)
        scalars = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        if not scalars["bytes"]:
            del scalars["bits_per_byte"]  # undefined: the targets are not text
        self._started, self._tokens, self._paused = now, 0.0, 0.0
        waited, self._waited = self._waited, 0.0
        return scalars | {
            "learning_rate": float(rate),
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": model_flops,
            "model_flops_utilization": model_flops / self._peak,
            "input_wait": min(1.0, waited / seconds),
        }
