"""The job that a process belongs to: from flags, environment variables or a scheduler."""

import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnlab.errors import InputError

# Variables with the meaning of the flags, for launchers that start the same command everywhere.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
MAX_PROCESSES = 100_000


@dataclass(frozen=True)
class JobFlags:
    """The flags that describe a job; see `find_job`.

    Attributes:
      distributed: "auto", "on" or "off".
      coordinator: address of process 0, "host:port".
      num_processes: number of processes.
      process_id: index of this process.
      startup_timeout: seconds to wait for the other processes.
      watchdog: seconds after which a process without progress ends the job.
    """

    distributed: str = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    startup_timeout: float = 300.0
    watchdog: float = 1800.0


@dataclass(frozen=True)
class Job:
    """The processes that run one command together.

    Attributes:
      coordinator: address of process 0, "host:port". JAX's coordination service listens on this
        port, and the roll call of `monitor` on the port below it.
      num_processes: number of processes, over 1.
      process_id: index of this process.
      local_device_ids: the GPUs of this process, if the scheduler starts one process per GPU; None
        means all devices of the machine.
      scheduler: where the settings come from, such as "slurm".
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    scheduler: str = "flags"

    @property
    def host(self) -> str:
        """Host name or address of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of JAX's coordination service."""
        return int(self.coordinator.rpartition(":")[2])


def is_main_process() -> bool:
    """Return whether this is process 0 of a job, which alone writes files and prints."""
    import jax  # here, since `--help` must not import JAX

    return jax.process_index() == 0


def log_of_process(line: str, log: Callable[[str], None] = print) -> None:
    """Log a line that concerns this process alone; in a job it names the process.

    Other processes than process 0 print nothing to stdout, so they print the line to stderr.
    """
    import jax

    if jax.process_count() > 1:
        line = f"process {jax.process_index()} on {socket.gethostname()}: {line}"
    if is_main_process():
        log(line)
    else:
        print(line, file=sys.stderr, flush=True)


def find_job(flags: JobFlags, environment: Mapping[str, str] = os.environ) -> Job | None:
    """Return the job of this process; None if it runs alone.

    Flags and the `VARIABLES` describe the job. Missing values come from a scheduler that JAX knows:
    Cloud TPU, SLURM, GKE JobSet or Open MPI. With "on", a process without a job is an error.

    Raises:
      InputError: the description of the job is incomplete or invalid.
    """
    mode, given = flags.distributed, {name: getattr(flags, name) for name in VARIABLES}
    present = [f"--{name}" for name, value in given.items() if value is not None]
    if mode == "off":
        if present:
            raise InputError(f"{', '.join(present)} cannot be used with --distributed=off")
        return None
    for name in VARIABLES:
        if given[name] is None:
            given[name] = _variable(name, environment)
    found = _from_scheduler(environment) if None in given.values() else None
    missing = [name for name, value in given.items() if value is None]
    if found is not None:
        fill = {name: getattr(found, name) for name in missing}
        job = Job(**(given | fill), local_device_ids=found.local_device_ids, scheduler=found.scheduler)
    elif not missing:
        job = Job(**given)  # type: ignore[arg-type]
    elif len(missing) == len(given):
        if mode == "on":
            raise InputError(
                "--distributed=on: no scheduler was found (Cloud TPU, SLURM, GKE JobSet or Open MPI); "
                "set --coordinator=HOST:PORT, --num_processes and --process_id"
            )
        return None
    else:
        needed = ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise InputError(f"a job of several processes also needs {needed}")
    _check(job)
    if job.num_processes == 1 and mode == "auto":
        return None
    return job


def _variable(name: str, environment: Mapping[str, str]) -> str | int | None:
    text = environment.get(VARIABLES[name])
    if not text or name == "coordinator":
        return text or None
    if not re.fullmatch(r"\d{1,9}", text):
        raise InputError(f"{VARIABLES[name]}={text!r} must be a whole number")
    return int(text)


def _from_scheduler(environment: Mapping[str, str]) -> Job | None:
    """Return the job as JAX reads it from the scheduler's variables; None without a scheduler."""
    if environment is not os.environ:
        return None
    # JAX has no public way to ask before it connects.
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        try:
            address = cluster.get_coordinator_address(
                timeout_secs=60, override_coordinator_port=environment.get("JAX_COORDINATOR_PORT")
            )
            local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
            return Job(
                address,
                int(cluster.get_process_count()),
                int(cluster.get_process_id()),
                None if local is None else (int(local),),
                cluster.name or cluster.__name__,
            )
        except Exception as error:  # of a metadata server, or an incomplete environment
            name = cluster.name or cluster.__name__
            raise InputError(
                f"the settings of {name} cannot be read ({type(error).__name__}: {error}); set "
                "--coordinator, --num_processes and --process_id, or --distributed=off"
            ) from error
    return None


def _check(job: Job) -> None:
    if not re.fullmatch(r"\[?[^\s/]+\]?:\d{1,5}", job.coordinator) or not 2 <= job.port < 2**16:
        raise InputError(
            f"--coordinator={job.coordinator!r} must be HOST:PORT, with a port from 2 to {2**16 - 1}"
        )
    if not 1 <= job.num_processes <= MAX_PROCESSES:
        raise InputError(f"--num_processes={job.num_processes} must be from 1 to {MAX_PROCESSES:,}")
    if not 0 <= job.process_id < job.num_processes:
        raise InputError(
            f"--process_id={job.process_id} must be from 0 to {job.num_processes - 1}, below "
            f"--num_processes={job.num_processes}"
        )
