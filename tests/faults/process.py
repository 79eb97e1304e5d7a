"""Processes under limits of memory and time, and the verdict on how they ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from attnlab.errors import InputError
from tests.programs import ROOT

MEMORY = 2 << 30  # bytes resident, of all processes of a case together
SECONDS = 20  # of CPU time per command, or without any progress
LONGEST = 300  # seconds of a case on a loaded machine
INTERVAL = 0.05  # seconds between two looks
ONE_LINE_CODES = (1, 2, 3, 4, 75, 130)
STOPPED_CODES = (75, 130)
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
# Lines with which Python reports an exception that nothing handled.
TRACES = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error")


class Result(NamedTuple):
    """The end of a case: a verdict, the fault, and the evidence."""

    verdict: str
    tried: str
    detail: str = ""


@dataclass
class Outcome:
    """A process that ended; `limit` names the limit at which it was killed, or is empty."""

    code: int
    out: str
    err: str
    limit: str = ""
    seconds: float = 0.0  # of CPU time
    memory: int = 0  # most bytes resident

    def result(self, tried: str, silent: str = "") -> Result:
        """Return the result of a case; `silent` is the wrong result of a process that succeeded."""
        verdict = self._verdict()
        if verdict == "clean" and self.code == 0 and silent:
            return Result("silent", tried, silent)
        if verdict == "reported":
            return Result(verdict, tried, _last_lines_of_report(self.err))
        last = (self.err.strip().splitlines() or self.out.strip().splitlines() or [""])[-1]
        return Result(verdict, tried, f"exit {self.code}, {self.seconds:.0f} s: {last[:160]}")

    def _verdict(self) -> str:
        if self.limit:
            return self.limit
        if any(trace in text for text in (self.err, self.out) for trace in TRACES):
            return "traceback"
        if self.code == 0:
            return "clean"
        lines = [line for line in self.err.splitlines() if line.strip()]
        if self.code == 1 and len(lines) == 1 and lines[0].startswith("error: unexpected"):
            return "reported"
        if self.code in STOPPED_CODES and not lines:  # stdout says how to resume the run
            return "clean"
        return "clean" if self.code in ONE_LINE_CODES and len(lines) == 1 else "not one line"


def _last_lines_of_report(err: str) -> str:
    """Return the exception of a report file and the last place in attnlab that raised it."""
    found = re.search(r"the traceback is in (\S+)", err)
    text = Path(found[1]).read_text() if found else err
    places = re.findall(r'File ".*?(attnlab/[^"]*)", line (\d+)', text)
    last = text.strip().splitlines()[-1][:160]
    return f"{':'.join(places[-1])}: {last}" if places else last


def fork(function: Callable[[], int], cwd: Path, environ: Mapping[str, str] | None = None) -> "Running":
    """Run a function in a child of this process, which has its own session, output and folder.

    The function returns the exit code. An exception that it does not handle is printed with its
    traceback. This process must not have threads, so it never initializes JAX's devices.
    """
    number = sum(1 for _ in cwd.glob(".out.*"))
    streams = [cwd / f".{name}.{number}" for name in ("out", "err")]
    for file in streams:
        file.touch()  # the child may be killed before it opens them
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(pid, *streams)
    code, returned = 1, False
    try:
        os.setsid()
        for descriptor, file in enumerate(["/dev/null", *streams]):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.environ.update(environ or {})
        os.chdir(cwd)
        code, returned = function(), True
        with contextlib.suppress(AttributeError, ValueError):  # an experiment may close or remove it
            sys.stdout.flush()
    except BaseException as error:
        # A Ctrl-C after the command line has returned reaches this function alone.
        if not (returned and isinstance(error, KeyboardInterrupt)):
            with contextlib.suppress(Exception):
                os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def spawn(arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> "Running":
    """Start `python run.py` with these arguments in a new interpreter."""
    number = sum(1 for _ in cwd.glob(".out.*"))
    out, err = (cwd / f".{name}.{number}" for name in ("out", "err"))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *arguments],
            **{"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr},
            **{"cwd": cwd, "env": os.environ | environ, "start_new_session": True},
        )
    child.returncode = 0  # `Running` waits for it
    return Running(child.pid, out, err)


def command_line(*commands: Sequence[str]) -> Callable[[], int]:
    """Return a function that runs command lines one after the other, until one fails."""

    def run() -> int:
        from attnlab.runner import cli

        sys.argv = [str(ROOT / "run.py")]
        for arguments in commands:
            if code := cli.main(["run.py", *arguments]):
                return code
        return 0

    return run


def as_user(function: Callable[[], object]) -> Callable[[], int]:
    """Return a function that calls `function` and reports its InputError in one line."""

    def run() -> int:
        try:
            function()
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return 2
        return 0

    return run


class Running:
    """A process that runs in a session of its own."""

    def __init__(self, pid: int, out: Path, err: Path):
        self.pid, self._streams = pid, (out, err)
        self.code: int | None = None

    def ended(self) -> bool:
        """Return whether the process ended, without waiting for it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def output(self) -> str:
        """Return the standard output so far."""
        return self._streams[0].read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process; SIGKILL ends all processes of its session."""
        leader = [self.pid] if self.code is None else []  # another process may have the number later
        for pid in {*leader, *(_session(self.pid) if number == signal.SIGKILL else ())}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, commands: int = 1) -> Outcome:
        """Wait for the end, or kill the process at a limit, and return the outcome."""
        try:
            limit, seconds, memory = self._watch(commands)
        finally:
            self.kill()  # also other processes of its session
        while not self.ended():
            time.sleep(INTERVAL / 10)
        texts = [file.read_text(errors="replace") for file in self._streams]
        return Outcome(self.code or 0, *texts, limit, seconds, memory)

    def _watch(self, commands: int) -> tuple[str, float, int]:
        """Return the exceeded limit or "", the CPU time and the most bytes of memory."""
        start = progress = time.monotonic()
        pids, looks, limit = [self.pid], 0, ""
        used, peak, spent = 0.0, 0, dict[int, float]()
        while not self.ended() and not limit:
            time.sleep(INTERVAL)
            looks += 1
            pids = _session(self.pid) if looks % 8 == 1 else pids
            spent |= {pid: seconds for pid in pids if (seconds := _cpu(pid)) is not None}
            peak, now = max(peak, sum(map(_resident, pids))), time.monotonic()
            if sum(spent.values()) > used:
                used, progress = sum(spent.values()), now
            over = used > SECONDS * commands or now - progress > SECONDS or now - start > LONGEST
            limit = "memory" if peak > MEMORY else "hang" if over else ""
        return limit, used, peak


def _session(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))) and int(fields[3]) == leader:
            found.append(int(name))
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name of the program; [] if it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu(pid: int) -> float | None:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else None


def _resident(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * PAGE if fields else 0
