"""Start of this process's part of a job, and its end."""

import jax

from attnlab.distributed.job import Job
from attnlab.distributed.monitor import Monitor
from attnlab.errors import InputError

_monitor: Monitor | None = None


def start(job: Job, timeout: float, watchdog: float) -> None:
    """Wait for the other processes of the job, and initialize JAX's distributed system.

    It must run before the first use of a device.

    Args:
      job: the job.
      timeout: seconds to wait for the other processes.
      watchdog: seconds after which a process without progress ends the job.

    Raises:
      InputError: processes are missing; the message names them.
    """
    global _monitor
    if _monitor is not None:  # a later run of a sweep
        return
    monitor = Monitor(job, watchdog)
    monitor.start(timeout)
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            local_device_ids=job.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=max(10, int(timeout)),
        )
    except RuntimeError as error:
        raise InputError(f"JAX could not connect to {job.coordinator}: {error}") from error
    _monitor = monitor


def progress(activity: str, step: int | None = None) -> None:
    """Record progress for the watchdog; does nothing in a process that runs alone."""
    if _monitor is not None:
        _monitor.progress(activity, step)


def finish(failure: str = "") -> None:
    """Announce the end of this process to its job.

    Args:
      failure: the reason why this process cannot go on; the others then end as well.
    """
    if _monitor is None:
        return
    if failure:
        _monitor.fail(failure)
    else:
        _monitor.close()


def in_job() -> bool:
    """Return whether this process is part of a job."""
    return _monitor is not None
