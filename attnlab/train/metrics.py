"""Where metrics go: `metrics.jsonl`, TensorBoard, the terminal, and the trackers that were asked for."""

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
FLUSH_SECONDS = 5.0  # between flushes of TensorBoard's file


class MetricWriter(Protocol):
    """Anything that takes metrics."""

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Take the metrics of one step of one split ("train" or "eval")."""


class Sink(MetricWriter, Protocol):
    """One place that metrics go to."""

    def close(self, failed: bool = False) -> None:
        """Finish, telling whether the run ended by an exception."""


class MetricWriters:
    """All the sinks of a run as one; on every process but the first it does nothing.

    Args:
        workdir: the run's folder, local or gs://.
        steps: how many steps the run plans, for the bar and its ETA; None where that is open.
        resume: the step the run goes on from: what was written of later steps is dropped. -1 drops all; None
            leaves everything as it is, as an evaluation has to.
        trackers: "wandb", "mlflow".
        config: the run's config by path (`attnlab.config.flatten`), for the trackers.
        progress: whether to show progress on the terminal.
        primary: whether this process writes; by default the first of JAX's processes does.

    Raises InputError where a tracker is not installed.
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
        # The trackers first: they may be missing, and then nothing is to be written. The bar last: it takes
        # over the terminal.
        self._sinks += [open_tracker(name, workdir, config or {}) for name in trackers]
        lines = JsonLines(workdir / "metrics.jsonl")
        if resume is not None:
            lines.truncate_after(resume)
        self._sinks += [lines, TensorBoard(workdir / "tensorboard", resume)]
        if progress:
            self._sinks.append(Progress(steps, start=max(resume or 0, 0)))

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of one step of one split everywhere; scalar arrays are as good as floats.

        Raises ValueError for a metric called "step", "split" or "time", which would hide those.
        """
        if not self._sinks:
            return
        if reserved := {"step", "split", "time"} & metrics.keys():
            raise ValueError(f"a metric cannot be called {reserved.pop()!r}")
        numbers = {name: x if type(x) is int else float(x) for name, x in metrics.items()}
        for sink in self._sinks:
            sink.write(int(step), split, numbers)

    def close(self, failed: bool = False) -> None:
        """Finish every sink, also when one of them cannot; `failed` marks the run so in the trackers."""
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
    """A file of one JSON object a line: step, split, time, then the metrics; on disk when `write` returns.

    `time` is the time of writing in seconds since 1970 (UTC), as `time.time()` returns it.

    NaN and the infinities, for which JSON has no numbers, are the strings "NaN", "Infinity" and "-Infinity";
    `read_metrics` turns them back. A last line that a killed process left unfinished is dropped.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Object stores cannot append; there the whole (small) file is written anew each time.
        self._appends = not is_remote(path)
        self._text = self._path.read_text() if self._path.exists() else ""
        if not self._text.endswith("\n"):
            self._text = self._text[: self._text.rfind("\n") + 1]
            write_atomically(self._path, self._text)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Add a line."""
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
        """Keep the lines of steps up to `step`; the file is the old one or the new one at every moment."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        self._text = "".join(line for line in lines if (row := _parse_line(line)) and row["step"] <= step)
        write_atomically(self._path, self._text)

    def close(self, failed: bool = False) -> None:
        """Nothing is left to do: every line is written."""


@contextlib.contextmanager
def _with_path_in_errors(path: epath.PathLike):
    """Says of which file an error is: a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, numbers as they were; an unfinished line is left out."""
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
    """Scalars called `split/metric`, on disk in a few seconds; see them with `tensorboard --logdir runs`.

    Written by the caller's own thread: tensorboardX's `SummaryWriter` waits for ever for its writing
    thread where that died of a full disk.
    """

    def __init__(self, folder: epath.PathLike, resume: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter  # takes a while to import

        self._folder, self._flushed = epath.Path(folder), time.monotonic()
        # File names tell the second only, and a run that goes on at once must not overwrite its own past.
        suffix = f".{uuid.uuid4().hex[:8]}"
        with _with_path_in_errors(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # tensorboardX writes local files; one for a bucket is copied there at each flush.
            self._local = epath.Path(tempfile.mkdtemp()) if is_remote(folder) else self._folder
            self._writer = EventsWriter(str(self._local / "events"), suffix)
            if resume is not None:
                # Event files only grow: TensorBoard itself hides the steps from here on that came before.
                self._add(resume + 1, session_log={"status": 1})
        self._flush()

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Add a point to each curve."""
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
