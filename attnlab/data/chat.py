"""Chat templates of checkpoints, rendered in a process with limits on memory and CPU time.

A template is a program in Jinja's language. The sandbox keeps it from Python's functions, but a
single expression, such as `10 ** (10 ** 9)`, can fill the memory or run for ever.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from attnlab.data import chat_worker
from attnlab.errors import InputError

WALL_SECONDS = 15  # of one rendering; a machine that is busy gives the CPU seconds of the limit later
START_SECONDS = 60
TOO_LARGE = json.dumps(
    {
        "error": f"it needs more than the {chat_worker.CPU_SECONDS} s of CPU time or the "
        f"{chat_worker.MEMORY_BYTES >> 20} MiB of memory that are allowed",
        "restart": True,
    }
)


def render(template: str, **values: Any) -> str:
    """Render a chat template, without tools and documents.

    Raises:
      InputError: the template refuses its values, cannot be rendered, or needs more than the limits
        of `chat_worker`.
    """
    try:
        request = json.dumps({"template": template, "values": values})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"this chat cannot be written as JSON: {error}") from error
    answer = _WORKER.ask(request)
    if "refused" in answer:
        raise InputError(f"the chat template refuses this chat: {answer['refused']}")
    if "error" in answer:
        raise InputError(f"the chat template cannot be used: {answer['error']}")
    return answer["text"]


class _Worker:
    """The process of `chat_worker`, started at the first request and after one that ended it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the process without ending it, as a forked process must."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str) -> dict[str, Any]:
        """Return the answer to a request, or an answer with "error" if there is none."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                    if self._read(START_SECONDS) is None:
                        raise RuntimeError("the process that renders chat templates does not start")
                answer = json.loads(self._exchange(request.encode() + b"\n") or TOO_LARGE)
            except BaseException:
                self.stop()
                raise
            if "restart" in answer:
                self.stop()
            return answer

    def _start(self) -> None:
        folders = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
        # -I and -S keep the modules and the startup files of the user out.
        command = [sys.executable, "-I", "-S", chat_worker.__file__, *sorted(folders)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ},
        )

    def _exchange(self, request: bytes) -> bytes | None:
        assert self._process is not None and self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
        return self._read(WALL_SECONDS)

    def _read(self, seconds: float) -> bytes | None:
        """Return the next line of the process; None if it ended or sent nothing for this time."""
        assert self._process is not None and self._process.stdout
        answer = bytearray()
        while not answer.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                return None
            answer += part
        return bytes(answer)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # from a request that was not sent whole
                self._process.communicate()
        self._process = None


_WORKER = _Worker()
atexit.register(_WORKER.stop)
os.register_at_fork(after_in_child=_WORKER.forget)
