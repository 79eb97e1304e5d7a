"""Metric writers: `metrics.jsonl`, TensorBoard, terminal progress and experiment trackers."""

import contextlib
import json
import socket
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from attnlab.distributed.job import is_main_process
from attnlab.paths import as_json, is_remote, write_atomically
from attnlab.train.progress import Progress
from attnlab.train.storage import append, retry
from attnlab.train.trackers import open_tracker
from attnlab.untrusted import check_regular

Metrics = Mapping[str, float]
UPLOAD_SECONDS = 5.0  # interval between writes of the TensorBoard event file in a bucket


class MetricWriter(Protocol):
    """Interface of metric writers."""

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Write the metrics of one step of one split ("train" or "eval")."""


class Sink(MetricWriter, Protocol):
    """A metric writer for one destination, which has to be closed."""

    def close(self, failed: bool = False) -> None:
        """Finish writing; `failed` reports that the run ended with an exception."""


class MetricWriters:
    """Writes metrics to all sinks of a run. Only the primary process writes.

    Args:
        workdir: the run's folder, local or gs://.
        steps: length of the run, for the progress bar and its ETA; None if unknown.
        resume: the step from which the run resumes. Metrics of later steps are dropped; -1 drops
            all. None keeps everything, as evaluation requires.
        trackers: names of trackers, "wandb" or "mlflow".
        config: the run's config by path (`attnlab.config.flatten`), for the trackers.
        progress: whether to show progress on the terminal.
        primary: whether this process writes; defaults to whether its JAX process index is 0.

    Raises:
        InputError: a tracker is unknown or not installed.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        steps: int | None = None,
        resume: int | None = None,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        progress: bool = True,
        primary: bool | None = None,
    ):
        self._sinks: list[Sink] = []
        if not (is_main_process() if primary is None else primary):
            return
        workdir = epath.Path(workdir)
        # The trackers come first: if one is not installed, no file is created. The progress bar
        # comes last because it takes over the terminal.
        self._sinks += [open_tracker(name, workdir, config or {}) for name in trackers]
        lines = JsonLines(workdir / "metrics.jsonl")
        if resume is not None:
            lines.truncate_after(resume)
        self._sinks += [lines, TensorBoard(workdir / "tensorboard", resume)]
        if progress:
            self._sinks.append(Progress(steps, start=max(resume or 0, 0)))

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step of one split, floats or scalar arrays, to every sink.

        Raises:
            ValueError: a metric has the reserved name "step", "split" or "time".
        """
        if not self._sinks:
            return
        if reserved := {"step", "split", "time"} & metrics.keys():
            raise ValueError(f"a metric cannot be called {reserved.pop()!r}")
        numbers = {name: x if type(x) is int else float(x) for name, x in metrics.items()}
        for sink in self._sinks:
            sink.write(int(step), split, numbers)

    def close(self, failed: bool = False) -> None:
        """Close every sink, even if one raises; `failed` marks the run in the trackers."""
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as stack:
            for sink in sinks:
                stack.callback(sink.close, failed)

    def __enter__(self) -> "MetricWriters":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class JsonLines:
    """JSON Lines file with step, split, time and metrics per line, on disk when `write` returns.

    `time` is the time of writing in seconds since 1970 (UTC), as returned by `time.time()`.

    NaN and the infinities, which JSON cannot represent, are written as the strings "NaN",
    "Infinity" and "-Infinity"; `read_metrics` converts them back. An unfinished last line, left by
    a killed process, is dropped. A complete one that lacks its newline is kept.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Object stores cannot append, so the whole (small) file is rewritten each time.
        self._appends = not is_remote(path)
        if self._path.exists():
            check_regular(self._path)  # reading a FIFO would block, and a device may have no end
        self._content = self._path.read_bytes() if self._path.exists() else b""
        if not self._content.endswith(b"\n"):
            before, newline, last = self._content.rpartition(b"\n")
            last = last + b"\n" if _parse_line(last) else b""
            self._content = before + newline + last
            write_atomically(self._path, self._content)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Append a line."""
        numbers = {name: as_json(value) for name, value in metrics.items()}
        row = {"step": step, "split": split, "time": round(time.time(), 3)} | numbers
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        if self._appends:
            retry(lambda: append(self._path, line), self._path)
        else:
            self._content += line
            retry(lambda: write_atomically(self._path, self._content), self._path)

    def truncate_after(self, step: int) -> None:
        """Atomically drop the lines of steps after `step`, and damaged lines."""
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines()
        kept = [line + b"\n" for line in lines if (row := _parse_line(line)) and row["step"] <= step]
        self._content = b"".join(kept)
        write_atomically(self._path, self._content)

    def close(self, failed: bool = False) -> None:
        """Do nothing: every line is already on disk."""


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl` with their original numbers; skips damaged lines."""
    return [row for line in epath.Path(path).read_bytes().splitlines() if (row := _parse_line(line))]


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None if it is unfinished or damaged."""
    try:
        row = json.loads(text)
        step, split = row.pop("step"), row.pop("split")
        if type(step) is not int or not isinstance(split, str):
            return None
        values = {name: float(x) if isinstance(x, str) else x for name, x in row.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not all(type(x) in (int, float) for x in values.values()):
        return None
    return {"step": step, "split": split} | values


class TensorBoard:
    """Writes scalars named `split/metric` to a TensorBoard event file.

    In a bucket, which cannot append to a file, it is rewritten every few seconds. The calling
    thread writes the file: tensorboardX's `SummaryWriter` uses a thread, and waits forever for it
    after a full disk has killed it.
    """

    def __init__(self, folder: epath.PathLike, resume: int | None = None):
        # File names contain the time in seconds; a run resumed within the same second must not
        # overwrite its earlier file.
        stamp = f"{int(time.time())}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self._path = epath.Path(folder) / f"events.out.tfevents.{stamp}"
        self._content, self._uploaded = b"", time.monotonic()
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        self._add(0, file_version="brain.Event:2")
        if resume is not None:
            # Event files are append-only. After this event TensorBoard hides the earlier values of
            # these steps.
            self._add(resume + 1, session_log={"status": 1})

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Write a scalar for each metric."""
        points = [{"tag": f"{split}/{name}", "simple_value": value} for name, value in metrics.items()]
        self._add(step, summary={"value": points})
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def close(self, failed: bool = False) -> None:
        """Complete the event file."""
        self._upload()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # takes a while to import
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        length = struct.pack("<Q", len(event))  # the format of TFRecord
        checksums = (struct.pack("<I", masked_crc32c(x)) for x in (length, event))
        record = length + next(checksums) + event + next(checksums)
        if is_remote(self._path):
            self._content += record
        else:
            retry(lambda: append(self._path, record), self._path)

    def _upload(self) -> None:
        """Write the event file to its bucket, if it is for one."""
        if is_remote(self._path):
            retry(lambda: write_atomically(self._path, self._content), self._path)
            self._uploaded = time.monotonic()
