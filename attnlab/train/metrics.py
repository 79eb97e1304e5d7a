"""Metric writers: `metrics.jsonl`, TensorBoard, terminal progress and experiment trackers."""

import contextlib
import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from attnlab.paths import as_json, is_remote, write_atomically
from attnlab.train.progress import Progress
from attnlab.train.trackers import open_tracker

Metrics = Mapping[str, float]
FLUSH_SECONDS = 5.0  # interval between flushes of the TensorBoard event file


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
        if not (_is_first_process() if primary is None else primary):
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


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


class JsonLines:
    """JSON Lines file with step, split, time and metrics per line, on disk when `write` returns.

    `time` is the time of writing in seconds since 1970 (UTC), as returned by `time.time()`.

    NaN and the infinities, which JSON cannot represent, are written as the strings "NaN",
    "Infinity" and "-Infinity"; `read_metrics` converts them back. An unfinished last line, left by
    a killed process, is dropped.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Object stores cannot append, so the whole (small) file is rewritten each time.
        self._appends = not is_remote(path)
        self._text = self._path.read_text() if self._path.exists() else ""
        if not self._text.endswith("\n"):
            self._text = self._text[: self._text.rfind("\n") + 1]
            write_atomically(self._path, self._text)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Append a line."""
        numbers = {name: as_json(value) for name, value in metrics.items()}
        row = {"step": step, "split": split, "time": round(time.time(), 3)} | numbers
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._appends:
            with _with_path_in_errors(self._path), open(self._path, "a") as file:
                file.write(line)
        else:
            self._text += line
            write_atomically(self._path, self._text)

    def truncate_after(self, step: int) -> None:
        """Atomically drop the lines of steps after `step`."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        self._text = "".join(line for line in lines if (row := _parse_line(line)) and row["step"] <= step)
        write_atomically(self._path, self._text)

    def close(self, failed: bool = False) -> None:
        """Do nothing: every line is already on disk."""


@contextlib.contextmanager
def _with_path_in_errors(path: epath.PathLike):
    """Add the path to an OSError: the error of a write to a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl` with their original numbers; skips an unfinished line."""
    return [line for text in epath.Path(path).read_text().splitlines() if (line := _parse_line(text))]


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return {k: float(v) if isinstance(v, str) and k != "split" else v for k, v in line.items()}


class TensorBoard:
    """Writes scalars named `split/metric` to a TensorBoard event file, flushed every few seconds.

    The calling thread writes the file. tensorboardX's `SummaryWriter` uses a writer thread, and
    waits forever for it after a full disk has killed it.
    """

    def __init__(self, folder: epath.PathLike, resume: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter  # takes a while to import

        self._folder, self._flushed = epath.Path(folder), time.monotonic()
        # File names contain the time in seconds; a run resumed within the same second must not
        # overwrite its earlier file.
        suffix = f".{uuid.uuid4().hex[:8]}"
        with _with_path_in_errors(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # tensorboardX writes only local files; a file for a bucket is copied there at each
            # flush.
            self._local = epath.Path(tempfile.mkdtemp()) if is_remote(folder) else self._folder
            self._writer = EventsWriter(str(self._local / "events"), suffix)
            if resume is not None:
                # Event files are append-only. After this event TensorBoard hides the earlier values
                # of these steps.
                self._add(resume + 1, session_log={"status": 1})
        self._flush()

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Write a scalar for each metric."""
        points = [{"tag": f"{split}/{name}", "simple_value": value} for name, value in metrics.items()]
        self._add(step, summary={"value": points})
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def close(self, failed: bool = False) -> None:
        """Close the event file."""
        with _with_path_in_errors(self._folder):
            self._writer.close()
            self._upload()
        if self._local != self._folder:
            self._local.rmtree()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with _with_path_in_errors(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        with _with_path_in_errors(self._folder):
            self._writer.flush()
            self._upload()
        self._flushed = time.monotonic()

    def _upload(self) -> None:
        """Copy the event file to its bucket, if it is for one."""
        for file in self._local.iterdir() if self._local != self._folder else ():
            (self._folder / file.name).write_bytes(file.read_bytes())
