"""The training loop: training steps, metrics, evaluations, checkpoints and stop conditions.

The metrics of a step are read one step later, so that the device never waits for the host.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
import numpy as np

from attnlab.data import Batch
from attnlab.distributed.job import is_main_process
from attnlab.distributed.start import progress
from attnlab.layers.linear import parameter_name
from attnlab.signals import Terminated
from attnlab.train.checkpoints import Checkpoints, SaveFailed
from attnlab.train.goodput import Goodput
from attnlab.train.meter import Meter
from attnlab.train.metrics import MetricWriter
from attnlab.train.profiler import Profiler
from attnlab.train.session import Session
from attnlab.train.slow_steps import SlowSteps
from attnlab.train.step import TrainState
from attnlab.train.stopping import Decision, agree, stop_on_signal
from attnlab.train.storage import RETRY_DELAYS, warn


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
      signal: the name of the signal; empty for other reasons.
    """

    state: TrainState
    step: int
    reason: str
    metrics: dict[str, float]
    signal: str = ""


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
      goodput: adds up the time of each part of the run.
    """

    session: Session
    batches: grain.DatasetIterator[Batch]
    validation: Iterable[Batch]
    checkpoints: Checkpoints
    writer: MetricWriter
    limits: Limits = Limits()
    profile_dir: str
    log: Callable[[str], None] = print
    goodput: Goodput = field(default_factory=Goodput)

    def run(self, state: TrainState) -> Outcome:
        """Train from `state` to the end of the run or to a limit, and save a checkpoint there.

        `state` is donated. On SIGTERM and SIGUSR1 (preemption) and SIGINT (Ctrl-C) the step is
        finished, or an evaluation ends at its next batch, and a checkpoint is written. A run that
        resumes first repeats the evaluation. A second SIGINT raises KeyboardInterrupt.

        Raises:
          Diverged: the loss or a gradient is not finite; the state is not saved.
          StorageError: the storage failed again and again.
        """
        config = self.session.experiment.train
        last = min(config.steps, self.limits.max_steps or config.steps)
        self._state, self._step = state, int(state.step)
        self._meter, self._slow_steps = Meter(self.session, self.goodput), SlowSteps(self.log)
        self._start, self._compiled = time.perf_counter(), False
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._eval_metrics: dict[str, float] = {}
        self._saved_step, self._saved_time, self._save_is_due = -1, time.perf_counter(), False
        self._saved_metrics: dict[str, float] | None = None
        self._failed_saves = 0
        if self._step < last:
            self.log("compiling the training step")
        self._decide, stop = Decision(), ""
        profiler = Profiler(self.limits.profile, self.profile_dir, self.log)
        with stop_on_signal() as self._signalled, profiler.running():
            if 0 < self._step < last and self._evaluation_is_missing():
                stop = self._evaluate()
            while self._step < last and not stop:
                stop = self._train_one_step(profiler)
                if not stop and self._step < last:
                    stop = self._evaluate_and_save(final=False)
            if not stop.startswith("SIG"):
                stop = self._evaluate_and_save(final=True) or stop
            if stop.startswith("SIG"):  # the machine is being preempted: save now
                self._flush_pending_metrics(force=True)
                self._save(evaluated=False)
            with self.goodput.measure("checkpoint"):
                self._write_checkpoint(start=False)
            stop = agree(self._signalled.name) or stop  # a signal may arrive in the last save
        if stop.startswith("SIG"):
            return Outcome(self._state, self._step, "signal", self._eval_metrics, stop)
        reason = stop or ("max_steps" if self._step < config.steps else "done")
        return Outcome(self._state, self._step, reason, self._eval_metrics)

    def _out_of_time(self) -> str:
        """Return the reason to stop if the time limit has passed; else ""."""
        limit = self.limits.max_time
        return "max_time" if limit is not None and time.perf_counter() - self._start >= limit else ""

    def _checkpoint_due(self) -> str:
        """Return "checkpoint" when this process wants one; else "".

        Any process does so if it could not write the last one, and process 0 if the time of
        `checkpoint_minutes` has passed. It does so once, since in a job the decision takes effect a
        step later.
        """
        if self.checkpoints.failed():
            return "checkpoint"
        minutes, now = self.session.experiment.train.checkpoint_minutes, time.perf_counter()
        if minutes is None or not is_main_process() or now - self._saved_time < 60 * minutes:
            return ""
        self._saved_time = now
        return "checkpoint"

    def _reason_to_stop(self, own: str, after: Any = None) -> str:
        """Return the reason for which all processes stop now; record a checkpoint that is due."""
        decided = self._decide(own or self._checkpoint_due(), after)
        if decided != "checkpoint":
            return decided
        self._save_is_due = True
        return ""

    def _train_one_step(self, profiler: Profiler) -> str:
        """Run a step; return the reason for which all processes stop after it, "" to continue."""
        times = [time.perf_counter()]
        with profiler.step(self._step + 1):
            with self.goodput.measure("input"):
                batch = next(self.batches)
            times.append(time.perf_counter())
            with (
                self.goodput.measure("step" if self._compiled else "compile"),
                nullcontext() if self._compiled else _garbage_collection_paused(),
            ):
                self._state, metrics = self.session.train_step(self._state, self.session.to_devices(batch))
            times.append(time.perf_counter())
            self._step += 1
            progress("training", self._step)
            # The metrics of the previous step are ready by now, so the device never waits for the
            # host.
            self._flush_pending_metrics()
        times.append(time.perf_counter())
        self._pending = (self._step, metrics)
        with self.goodput.measure("step"):  # in a job, it waits for the vote of an earlier step
            stop = self._reason_to_stop(self._signalled.name or self._out_of_time(), self._pending)
        times.append(time.perf_counter())
        if self._compiled:
            self._slow_steps.add(self._step, *np.diff(times))
        self._compiled = True
        profiler.finish(self._step, metrics)
        return stop

    def _flush_pending_metrics(self, force: bool = False) -> None:
        """Check that the last step was finite, and write its metrics if a line is due.

        Otherwise one number is copied to the host: whether the step was finite.
        """
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        with self.goodput.measure("step"):
            is_finite = bool(device_metrics["is_finite"])
        if not is_finite:
            raise divergence(step, jax.device_get(device_metrics), self.session)
        self._meter.count(device_metrics)
        if step == 1 or step % self.session.experiment.train.log_every == 0 or force:
            metrics = jax.device_get(device_metrics)
            numbers = self._meter.read(step, metrics) | {"slow_steps": self._slow_steps.count}
            self.writer.write(step, "train", numbers)

    def _evaluate_and_save(self, final: bool) -> str:
        """Evaluate and save a checkpoint where this step is due; always both if `final`.

        Returns:
          The name of the signal that ended the evaluation, before the save; else "".
        """
        config, step = self.session.experiment.train, self._step
        evaluate = final or step % config.eval_every == 0
        save = final or step % config.checkpoint_every == 0 or self._save_is_due
        if not (evaluate or save):
            return ""
        self._flush_pending_metrics(force=final)
        if evaluate and (stop := self._evaluate()):
            return stop
        if save or self._save_is_due:  # it may have become due in the evaluation
            self._save(evaluated=evaluate)
        return ""

    def _evaluation_is_missing(self) -> bool:
        """Return whether a signal ended the evaluation of this step before the run resumed."""
        due = self._step % self.session.experiment.train.eval_every == 0
        return due and not self.checkpoints.has_metrics(self._step)

    def _evaluate(self) -> str:
        """Evaluate and write the metrics; return the name of the signal that ended it, else ""."""
        with self.goodput.measure("evaluation"):
            params = self.session.eval_params(self._state)
            try:
                self._eval_metrics = self.session.evaluate(params, self._until_signal(self.validation))
            except Terminated as stopped:
                return stopped.name
            if not self.checkpoints.has_metrics(self._step):  # otherwise the line is already written
                self.writer.write(self._step, "eval", self._eval_metrics)
        return ""

    def _until_signal(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; raise `Terminated` in all processes once one has got a signal."""
        for batch in batches:
            stop = self._reason_to_stop(self._signalled.name)
            if stop.startswith("SIG"):
                raise Terminated(stop)
            yield batch

    def _save(self, evaluated: bool) -> None:
        """Start writing a checkpoint of this step, with the metrics of its evaluation if any."""
        if self._saved_step == self._step:
            return
        self._saved_metrics = self._eval_metrics if evaluated else None
        with self.goodput.measure("checkpoint"):
            self._write_checkpoint(start=True)
        self._saved_step, self._saved_time, self._save_is_due = self._step, time.perf_counter(), False

    def _write_checkpoint(self, start: bool) -> None:
        """Start writing a checkpoint of this step, or wait for it, and repeat it if it fails.

        The processes of a job fail together, so they also repeat it together.
        """
        attempts = 0
        while True:
            try:
                if start or attempts:
                    position = self.batches.get_state()
                    self.checkpoints.save(self._step, self._state, position, self._saved_metrics)
                if not start:
                    self.checkpoints.wait()
                if not attempts:  # the one before is complete
                    self._failed_saves = 0
                return
            except SaveFailed as failure:
                attempts, self._failed_saves = attempts + 1, self._failed_saves + 1
                if self._failed_saves > len(RETRY_DELAYS):
                    raise
                delay = RETRY_DELAYS[self._failed_saves - 1]
                if failure.own or is_main_process():
                    warn(str(failure), delay, self.log)
                time.sleep(delay)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector: tracing makes many objects, few of them garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def divergence(step: int, metrics: dict[str, Any], session: Session) -> Diverged:
    """Return the error of a step that was not finite.

    It names the first non-finite gradient, in the order of the parameters.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(session.abstract_state.params)]
    non_finite = [i for i, norm in enumerate(metrics["leaf_norms"]) if not np.isfinite(norm)]
    where = f"the gradient of {parameter_name(paths[non_finite[0]])}" if non_finite else "the loss itself"
    return Diverged(
        f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; "
        f"the first non-finite tensor is {where}"
    )
