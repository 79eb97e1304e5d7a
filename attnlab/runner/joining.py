"""The start of a command in a job: every process does the same work in the same workdir."""

import contextlib
import dataclasses
import hashlib
import os
import sys
import time
import uuid

import jax
from etils import epath

from attnlab import config
from attnlab.distributed import collectives
from attnlab.distributed.job import Job, is_main_process
from attnlab.distributed.start import start
from attnlab.errors import InputError
from attnlab.paths import is_remote
from attnlab.runner.request import Request

MOST_DELAY = 30.0  # seconds until a shared file system shows a new file everywhere


def join(request: Request, job: Job) -> Request:
    """Join the job, and return the request with the workdir of process 0.

    Process 0 alone prints to stdout; errors of every process go to its stderr.

    Raises:
      InputError: processes are missing, have other flags, or do not see the same workdir.
    """
    start(job, request.job.startup_timeout, request.job.watchdog)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end of the process
    own, agreed = _summary(request), collectives.broadcast(_summary(request))
    if own != agreed:
        differing = ", ".join(name for name in agreed if own.get(name) != agreed[name])
        raise InputError(f"process {jax.process_index()} and process 0 have different values of: {differing}")
    if request.workdir is None:
        return request
    workdir = epath.Path(collectives.broadcast(str(request.workdir)))
    if workdir != request.workdir:  # by the clocks, or a folder that one process created first
        with contextlib.suppress(OSError, ValueError):
            request.workdir.rmdir()
    if request.mode in ("train", "import") and not is_remote(workdir):
        _check_shared(workdir)
    return dataclasses.replace(request, workdir=workdir)


def _summary(request: Request) -> dict[str, str]:
    """Return the values that must be equal in all processes, as text."""
    own = {"workdir", "job", "loaded", "sources", "opening", "config"}
    flags = {f.name: str(getattr(request, f.name)) for f in dataclasses.fields(request) if f.name not in own}
    fields = {f"config.{path}": str(value) for path, value in config.flatten(request.config).items()}
    source = hashlib.sha256(str(request.loaded.source).encode()).hexdigest()
    return flags | fields | {"experiment file": source}


def _check_shared(workdir: epath.Path) -> None:
    """Check that every process sees the workdir of process 0."""
    file = workdir / f".seen.{collectives.broadcast(uuid.uuid4().hex)}"
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        file.touch()
    collectives.barrier()
    deadline = time.monotonic() + MOST_DELAY
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = collectives.largest(0 if file.exists() else jax.process_index())
    if is_main_process():
        file.unlink()
    if blind:
        raise InputError(
            f"process {blind} does not see the folder {workdir} of process 0: the workdir of a job "
            "must be in a shared file system or in a bucket"
        )
