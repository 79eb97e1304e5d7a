"""An exclusive lock on a workdir: two runs never write to it at the same time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from attnlab.errors import InputError
from attnlab.paths import is_remote

LOCK = ".lock"
# The file system has no locks, such as some FUSE mounts.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class WorkdirInUse(InputError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def exclusive(workdir: epath.Path) -> Iterator[None]:
    """Hold the lock of a local workdir, with the owner in `workdir/.lock`.

    The kernel releases the lock when the process or its machine dies, so the file alone locks
    nothing. The file is deleted at a regular end. A bucket has no locks, and nothing is done.

    Raises:
      WorkdirInUse: another process holds the lock.
    """
    if is_remote(workdir):
        yield
        return
    file = Path(os.fspath(workdir)) / LOCK
    descriptor = _acquire(file)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_this_process()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 4096)
            os.close(descriptor)
            raise WorkdirInUse(_in_use(file, owner)) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            reason = f"warning: {file} cannot be locked ({error.strerror})"
            print(f"{reason}: start no second run in this workdir", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)  # its owner deleted the file between open and flock


def _this_process() -> dict[str, str | int]:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _in_use(file: Path, owner: bytes) -> str:
    try:
        content = json.loads(owner)
        by = f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, LookupError, TypeError):  # it is being written
        by = "another process"
    return f"{file.parent} is in use by {by}; wait until it ends, or choose another --workdir"
