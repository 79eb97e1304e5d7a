"""The roll call at the start of a job, and the watch over its processes while it runs.

Process 0 serves one connection to each process, on the port below JAX's coordination service.
Every process reports its progress once a second. A closed connection means that a process died. A
process that is silent, or that makes no progress while the others wait for it, is stuck: JAX's own
heartbeat does not see a stuck process, whose threads still run. In each case all processes end with
one line that names the process and its step.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attnlab.distributed.job import Job
from attnlab.errors import InputError

PERIOD = 1.0  # seconds between two reports
MAX_MESSAGE = 2**16
LOST = 1  # exit code of a process that ends because another one is lost


@dataclass
class Member:
    """What process 0 knows of a process.

    Attributes:
      connection: its socket.
      host: name of its machine.
      step: its last training step.
      events: number of times it reported progress.
      activity: its current activity, such as "training".
      heard: time of its last message, in seconds.
      moved: time at which `events` last changed.
      ended: whether it announced its end.
      received: bytes of an incomplete message.
    """

    connection: socket.socket
    host: str = "?"
    step: int = 0
    events: int = 0
    activity: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    ended: bool = False
    received: bytes = b""


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message; a closed connection is noticed by the reader."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def receive(member: Member) -> list[dict[str, Any]] | None:
    """Return the complete messages that have arrived; None at the end of the connection.

    Raises:
      TimeoutError: nothing arrived within the connection's timeout.
    """
    try:
        data = member.connection.recv(MAX_MESSAGE)
    except (BlockingIOError, InterruptedError):
        return []
    except TimeoutError:
        raise
    except OSError:
        return None
    if not data:
        return None
    *lines, member.received = (member.received + data).split(b"\n")
    try:
        messages = [json.loads(line) for line in lines if line]
    except ValueError:
        return None
    if len(member.received) > MAX_MESSAGE or not all(isinstance(m, dict) for m in messages):
        return None
    return messages


class Server:
    """The connections of process 0.

    Args:
      job: the job.
      watchdog: seconds without progress or message after which a process is stuck.

    Raises:
      InputError: the port is in use.
    """

    def __init__(self, job: Job, watchdog: float):
        self._job, self._watchdog = job, watchdog
        self._selector = selectors.DefaultSelector()
        self.members: dict[int, Member] = {}
        self._connected: list[Member] = []
        try:
            self._listener = socket.create_server(
                ("", job.port - 1), family=socket.AF_INET, backlog=min(job.num_processes, 4096)
            )
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen on port {job.port - 1}, the one below --coordinator="
                f"{job.coordinator}: {error.strerror}; choose another port"
            ) from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def call_roll(self, timeout: float) -> None:
        """Wait until every process has connected, then tell all of them to start.

        Raises:
          InputError: processes are missing after `timeout` seconds, or two have the same index.
        """
        deadline = time.monotonic() + timeout
        while len(self.members) < self._job.num_processes:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [i for i in range(self._job.num_processes) if i not in self.members]
                self._refuse(
                    f"{len(self.members)} of {self._job.num_processes} processes started within "
                    f"{timeout:.0f} s; missing: process {ranges(missing)}"
                )
            for member, message in self._messages(min(left, PERIOD)):
                if "process_id" in message:
                    self._admit(member, message)
                elif "lost" in message:
                    self.members = {i: m for i, m in self.members.items() if m is not member}
        for member in self.members.values():
            send(member.connection, {"start": True})
            member.heard = member.moved = time.monotonic()

    def _admit(self, member: Member, hello: dict[str, Any]) -> None:
        if reason := self._contradiction(hello):
            self._refuse(reason)
        member.host = str(hello.get("host"))
        self.members[hello["process_id"]] = member

    def _contradiction(self, hello: dict[str, Any]) -> str | None:
        """Return why a process cannot belong to the job; None if it can."""
        index, count, host = hello["process_id"], hello.get("num_processes"), hello.get("host")
        if count != self._job.num_processes:
            return f"process {index} on {host} has num_processes={count}, not {self._job.num_processes}"
        if index in self.members:
            return f"the processes on {self.members[index].host} and {host} both have process_id={index}"
        return None

    def _refuse(self, reason: str) -> None:
        for member in self._connected:
            send(member.connection, {"refused": reason})
        raise InputError(f"the job did not start: {reason}")

    def _messages(self, timeout: float):
        """Yield (member, message) of everything that arrives; a lost connection yields "lost"."""
        for key, _ in self._selector.select(max(timeout, 0)):
            if key.data is None:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._connected.append(Member(connection))
                self._selector.register(connection, selectors.EVENT_READ, self._connected[-1])
                continue
            messages = receive(key.data)
            if messages is None:
                self._selector.unregister(key.fileobj)
                messages = [{"lost": True}]
            else:
                key.data.heard = time.monotonic()
            for message in messages:
                yield key.data, message

    def watch(self) -> str:
        """Watch all processes until one is lost, and return the line that says which.

        The line is empty if all of them have announced their end.
        """
        own = {id(member): index for index, member in self.members.items()}
        while True:
            for member, message in self._messages(PERIOD):
                index = own.get(id(member))
                if index is None:  # not of this job
                    if "process_id" in message:
                        send(member.connection, {"refused": self._contradiction(message)})
                    continue
                if "failed" in message:
                    return f"{self._name(index)} failed: {message['failed']}"
                if "ended" in message:
                    member.ended = True
                elif "lost" in message and not member.ended:
                    return f"{self._name(index)} died"
                elif "events" in message:
                    _update(member, message)
            if all(member.ended for member in self.members.values()):
                return ""
            for member in self.members.values():
                send(member.connection, {"alive": True})
            if stuck := self._stuck():
                return stuck

    def _stuck(self) -> str | None:
        now = time.monotonic()
        running = {i: m for i, m in self.members.items() if not m.ended}
        for index, member in running.items():
            if now - member.heard > self._watchdog:
                return f"{self._name(index)} has been silent for {now - member.heard:.0f} s"
        waiting = {i: m for i, m in running.items() if now - m.moved > self._watchdog}
        if not running or len(waiting) < len(running):
            return None
        # All wait: the one with the least progress holds up the others.
        index = min(waiting, key=lambda i: waiting[i].events)
        return f"{self._name(index)} has made no progress for {now - waiting[index].moved:.0f} s"

    def _name(self, index: int) -> str:
        member = self.members[index]
        return f"process {index} on {member.host} (step {member.step}, {member.activity})"

    def stop_all(self, line: str) -> None:
        """Tell every process to end."""
        for member in self.members.values():
            send(member.connection, {"stop": line} if line else {"all ended": True})


def _update(member: Member, message: dict[str, Any]) -> None:
    if message["events"] != member.events:
        member.moved = time.monotonic()
    member.events, member.step = message["events"], message["step"]
    member.activity = str(message["activity"])


def ranges(indices: list[int]) -> str:
    """Return sorted indices as text, such as "1, 4-7"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts)


class Monitor:
    """The connection of this process to process 0, and in process 0 the server.

    Args:
      job: the job.
      watchdog: seconds without progress after which a process is stuck.
      end: called with the line that says why the job ends; by default it prints the line to stderr
        and ends the process, whose main thread may be blocked in a collective.
    """

    def __init__(self, job: Job, watchdog: float, end: Callable[[str], None] | None = None):
        self._job, self._watchdog, self._end = job, watchdog, end or _end_process
        self._events, self._step, self._activity = 0, 0, "starting"
        self._closing = False
        self._all_ended = threading.Event()

    def start(self, timeout: float) -> None:
        """Connect to process 0 and wait until every process of the job has done so.

        Raises:
          InputError: process 0 does not answer within `timeout` seconds, or processes are missing.
        """
        server = Server(self._job, self._watchdog) if self._job.process_id == 0 else None
        failure: list[InputError] = []
        call = threading.Thread(target=_call_roll, args=(server, timeout, failure), daemon=True)
        if server is not None:
            call.start()
        self._member = Member(_connect(self._job, timeout))
        hello = {"process_id": self._job.process_id, "num_processes": self._job.num_processes}
        send(self._member.connection, hello | {"host": socket.gethostname()})
        self._await_start(timeout + 10)
        if server is not None:
            call.join()
            if failure:
                raise failure[0]
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        threading.Thread(target=self._report, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _await_start(self, timeout: float) -> None:
        self._member.connection.settimeout(timeout)
        while True:
            try:
                messages = receive(self._member)
            except TimeoutError:
                messages = None
            if messages is None:
                raise InputError(f"the job did not start: process 0 at {self._job.host} gave no answer")
            for message in messages:
                if "refused" in message:
                    raise InputError(f"the job did not start: {message['refused']}")
                if "start" in message:
                    self._member.connection.settimeout(self._watchdog)
                    return

    def progress(self, activity: str, step: int | None = None) -> None:
        """Record that the main thread has made progress.

        Args:
          activity: the current activity, such as "training".
          step: the training step; None keeps the last one.
        """
        self._events += 1
        self._activity = activity
        self._step = self._step if step is None else step

    def fail(self, reason: str) -> None:
        """Tell the job that this process ends with an error, so that no process waits for it."""
        self._closing = True
        send(self._member.connection, {"failed": reason})
        if self._job.process_id == 0:
            time.sleep(PERIOD)  # its server has to tell the others

    def close(self) -> None:
        """Announce the regular end of this process, and wait for that of the others."""
        send(self._member.connection, {"ended": True})
        self._all_ended.wait()
        self._closing = True

    def _report(self) -> None:
        while not self._closing:
            state = {"events": self._events, "step": self._step, "activity": self._activity}
            send(self._member.connection, state)
            time.sleep(PERIOD)

    def _listen(self) -> None:
        while not self._closing:
            fate = "died"
            try:
                messages = receive(self._member)
            except TimeoutError:
                messages, fate = None, f"has been silent for {self._watchdog:.0f} s"
            if messages is None:
                if not self._closing:
                    self._end(f"process 0 on {self._job.host} {fate} (step {self._step})")
                return
            for message in messages:
                if "stop" in message and not self._closing:
                    self._end(str(message["stop"]))
                    return
                if "all ended" in message:
                    self._all_ended.set()
                    return

    def _serve(self, server: Server) -> None:
        line = server.watch()
        server.stop_all(line)
        if self._closing or not line:
            return
        time.sleep(PERIOD / 2)  # the messages leave before the connections close
        self._end(line)


def _call_roll(server: Server, timeout: float, failure: list[InputError]) -> None:
    try:
        server.call_roll(timeout)
    except InputError as error:
        failure.append(error)


def _connect(job: Job, timeout: float) -> socket.socket:
    """Return a connection to process 0, retried until `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((job.host, job.port - 1), timeout=5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"the job did not start: process 0 did not answer at {job.host}, port {job.port - 1}, "
                    f"within {timeout:.0f} s ({error.strerror or error})"
                ) from error
            time.sleep(0.2)


def _end_process(line: str) -> None:
    """Print why the job ends, and end the process."""
    sys.stdout.flush()
    print(
        f"error: {line}; this process ends, and the same command resumes the run", file=sys.stderr, flush=True
    )
    os._exit(LOST)
