"""Stop requests: SIGTERM, SIGUSR1 and Ctrl-C end a run that the same command resumes."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from attnlab.distributed.collectives import Vote, largest
from attnlab.signals import Terminated, handlers, raise_on_signal

NOTICE = b"\nstopping with a checkpoint; press Ctrl-C again to stop at once\n"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Decisions after a step: continue, save a checkpoint, or stop for a reason. The processes of a job
# prefer the later ones. SLURM's --signal=USR1@SECONDS sends SIGUSR1 before the time limit.
REASONS = ("", "checkpoint", "max_time", "SIGUSR1", "SIGTERM", "SIGINT")


@dataclass
class StopRequest:
    """The name of the first signal that requested a stop; empty if there was none."""

    name: str = ""


class Decision:
    """The decision to save or to stop, which all processes of a job take at the same step or batch.

    A process alone decides at once. In a job, a reason of one process takes effect in all of them
    at the next call, so that no step waits for the decision.
    """

    def __init__(self) -> None:
        self._vote = Vote()

    def __call__(self, reason: str, after: Any = None) -> str:
        """Return one of `REASONS` given this process's own; "" to continue.

        `after` are arrays that the current step computes; see `Vote`.
        """
        return REASONS[self._vote(REASONS.index(reason), after)]


def agree(reason: str) -> str:
    """Return the reason of the job, given this process's own; waits for every process."""
    return REASONS[largest(REASONS.index(reason))]


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record the first signal in the yielded `StopRequest`, for the loop to check.

    A SIGINT after the first signal raises KeyboardInterrupt. A further SIGTERM or SIGUSR1 changes
    nothing, because job schedulers repeat them.
    """
    request = StopRequest()

    def handle(number: int, _: object) -> None:
        if request.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, NOTICE)  # print is not reentrant
        request.name = request.name or signal.Signals(number).name

    with handlers(handle, *STOP_SIGNALS):
        yield request


@contextmanager
def stop_report() -> Iterator[Callable[[], None]]:
    """Raise `Terminated` if a signal arrives; yield a function that every process calls often.

    A process alone raises it at once. In a job, the yielded function raises it in all processes at
    the same call, since a process that stopped alone would leave the others in a collective.
    """
    if jax.process_count() == 1:
        with raise_on_signal(*STOP_SIGNALS):
            yield lambda: None
        return
    with stop_on_signal() as request:

        def poll() -> None:
            if name := agree(request.name):
                raise Terminated(name)

        yield poll
