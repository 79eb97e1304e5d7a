"""The exit codes of the command line, and the exceptions that end a run with one of them."""

import signal
from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes. docs/checkpoints.md has the same table."""

    DONE = 0
    FAILED = 1
    """The loss diverged, the storage kept failing, or an internal error."""
    BAD_INPUT = 2
    CLAIM_FAILED = 3
    DOES_NOT_FIT = 4
    """The memory of the machine or of a device is too small."""
    PREEMPTED = 75
    """SIGTERM or SIGUSR1: a checkpoint is saved if training had begun, and the same command resumes
    (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """Ctrl-C. A checkpoint is saved if training had begun."""
    BROKEN_PIPE = 141


class Stopped(Exception):
    """A signal stopped a run, which can be resumed.

    Args:
      signal_name: "SIGTERM", "SIGUSR1" or "SIGINT".
    """

    def __init__(self, signal_name: str):
        super().__init__(f"stopped by {signal_name}")
        interrupted = signal_name == signal.SIGINT.name
        self.code = ExitCode.INTERRUPTED if interrupted else ExitCode.PREEMPTED


class ClaimsFailed(Exception):
    """A run is done, and claims of its experiment failed.

    Args:
      claims: the names of the failed claims.
      metrics: the final metrics of the run.
    """

    def __init__(self, claims: list[str], metrics: Mapping[str, float]):
        super().__init__("claim failed: " + "; ".join(claims))
        self.claims, self.metrics = claims, metrics


def memory_exhausted(error: BaseException) -> bool:
    """Return whether an exception reports that the memory of the host or of a device is full."""
    message = error.args[0] if error.args else None  # an experiment's exception may have no text
    of_device = isinstance(message, str) and message.startswith("RESOURCE_EXHAUSTED")  # of XLA
    return isinstance(error, MemoryError) or of_device
