"""Profiler traces of training steps: of a range of steps, or of the next ones after SIGUSR2."""

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from attnlab.distributed.job import log_of_process
from attnlab.paths import is_remote, write_atomically
from attnlab.signals import handlers

STEPS_AFTER_SIGNAL = 5


class Profiler:
    """Traces a range of steps, and the next steps after SIGUSR2, also if training ends within them.

    In a job, every process writes a folder of its own, and SIGUSR2 concerns only the process that
    receives it.

    Args:
      steps: half-open range (start, stop) of steps to trace; None traces only after SIGUSR2.
      folder: folder of the traces.
      log: called with a line for each trace.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: str, log: Callable[[str], None]):
        own = f"/process_{jax.process_index()}" if jax.process_count() > 1 else ""
        self._steps, self._folder, self._log = steps or (0, 0), folder + own, log
        self._requested = False
        self._first: int | None = None  # step of the running trace
        self._stop, self._local = 0, folder

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Enclose a step, which is named in every trace."""
        if self._first is None and step in range(*self._steps):
            self._start(step, self._steps[1])
        elif self._first is None and self._requested:
            self._requested = False
            self._start(step, step + STEPS_AFTER_SIGNAL)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _start(self, step: int, stop: int) -> None:
        # XLA writes only local files; a trace for a bucket is copied there when it stops.
        self._local = tempfile.mkdtemp() if is_remote(self._folder) else self._folder
        jax.profiler.start_trace(self._local)
        self._first, self._stop = step, stop

    def finish(self, step: int, metrics: Any) -> None:
        """Write the trace after its last step, once the devices have finished it."""
        self._last = step
        if self._first is not None and step + 1 == self._stop:
            jax.block_until_ready(metrics)
            self._write()

    def _write(self) -> None:
        jax.profiler.stop_trace()
        if self._local != self._folder:
            for file in filter(Path.is_file, Path(self._local).rglob("*")):
                target = epath.Path(self._folder) / str(file.relative_to(self._local))
                write_atomically(target, file.read_bytes())
            shutil.rmtree(self._local)
        line = f"wrote a profiler trace of steps {self._first} to {self._last} to {self._folder}"
        log_of_process(line, self._log)
        self._first = None

    @contextmanager
    def running(self) -> Iterator["Profiler"]:
        """Trace at SIGUSR2 within this context, and write an unfinished trace at its end."""

        def request(*_: object) -> None:
            self._requested = True

        with handlers(request, signal.SIGUSR2):
            try:
                yield self
            finally:
                if self._first is not None:
                    self._write()
