"""Writes that are repeated when the storage fails, such as a full disk or a network file system."""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from attnlab.distributed.job import log_of_process
from attnlab.errors import StorageError

T = TypeVar("T")
RETRY_DELAYS = (1.0, 4.0, 16.0)  # seconds before each retry
# Waiting does not help against these.
PERMANENT = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def system_error(error: BaseException) -> str | None:
    """Return the operating system's message for a write error; None for any other error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(r"([^:]*)\[os_error_code=", str(error))  # TensorStore's format
    return match[1].strip() if match else None


def retry(write: Callable[[], T], path: epath.PathLike) -> T:
    """Return `write()`, repeated a few times with growing delays if the storage fails.

    A line names the path and the error before each delay.

    Args:
      write: a function that may be repeated after an OSError.
      path: the file or folder that it writes.

    Raises:
      StorageError: it failed each time.
      OSError: a retry cannot help, for example because of missing permissions.
    """
    for number, delay in enumerate((*RETRY_DELAYS, None), 1):
        try:
            return write()
        except OSError as error:
            reason = system_error(error)
            if reason is None or error.errno in PERMANENT:
                raise
            if delay is None:
                raise StorageError(f"{path} could not be written {number} times: {reason}") from error
            warn(f"{path} could not be written: {reason}", delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def warn(failure: str, delay: float, log: Callable[[str], None] = print) -> None:
    """Log that a write failed and is repeated after `delay` seconds."""
    log_of_process(f"warning: {failure}; trying again in {delay:.0f} s", log)


def append(path: epath.PathLike, data: bytes) -> None:
    """Append to a local file; after an error, which names the path, the file is as before."""
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.seek(0, 2)
            try:
                while data:
                    data = data[file.write(data) :]  # a nearly full disk takes a part
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
