"""Reports training steps that take much longer than the others."""

import statistics
import time
from collections import deque
from collections.abc import Callable

from attnlab.distributed.job import is_main_process, log_of_process

FACTOR = 3.0  # a step is slow from this multiple of the median,
EXCESS = 1.0  # and this number of seconds above it
WINDOW = 128  # number of recent steps whose median counts
FEWEST = 8  # number of steps before the first judgement
SECONDS_BETWEEN_LINES = 60.0


class SlowSteps:
    """Compares each step with the median time of the recent ones, which outliers do not move.

    In a job, a slow process makes all others wait for the devices. Therefore only process 0 reports
    such a wait; a process that was slow itself, in its input or on its host, reports that.

    Args:
      log: called with each line of process 0.

    Attributes:
      count: number of slow steps so far, also of those without a line.
    """

    def __init__(self, log: Callable[[str], None]):
        self._log = log
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._logged = -SECONDS_BETWEEN_LINES
        self.count = 0

    def add(self, step: int, input_wait: float, dispatch: float, metrics_wait: float, vote: float) -> None:
        """Record a step, and log a line if it is slow.

        Args:
          step: the step that was dispatched.
          input_wait: seconds of waiting for the batch.
          dispatch: seconds of the dispatch.
          metrics_wait: seconds of waiting for the metrics of the step before.
          vote: seconds of waiting for the devices in the vote of a job.
        """
        device_wait = metrics_wait + vote
        seconds = input_wait + dispatch + device_wait
        median = statistics.median(self._recent) if len(self._recent) >= FEWEST else seconds
        self._recent.append(seconds)
        if seconds < FACTOR * median or seconds < median + EXCESS:
            return
        self.count += 1
        now = time.monotonic()
        if now - self._logged < SECONDS_BETWEEN_LINES:
            return
        causes = {
            "waiting for input": input_wait,
            "on the host": dispatch,
            "waiting for the devices": device_wait,
        }
        cause = max(causes, key=lambda name: causes[name])
        waited = cause == "waiting for the devices"
        if waited and not is_main_process():
            return
        self._logged = now
        ratio, slow = seconds / max(median, 1e-9), step - (waited and metrics_wait > vote)
        log_of_process(
            f"step {slow} was slow: {seconds:.1f} s, {ratio:.0f} times the median; "
            f"{causes[cause]:.1f} s of it {cause}",
            self._log,
        )
