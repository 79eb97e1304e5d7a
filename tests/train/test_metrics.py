"""Metric sinks on real files, and trackers on fake modules that record calls."""

import io
import json
import math
import os
import struct
import sys
import types

import pytest
from rich.console import Console

from attnlab.errors import InputError
from attnlab.train import metrics as sinks
from attnlab.train import progress
from attnlab.train.metrics import JsonLines, MetricWriters


def lines(path):
    """Return the rows of a metrics.jsonl without their time, which differs between runs."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["time"]
    return rows


# metrics.jsonl ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/dev/zero", "fifo"])
def test_json_lines_refuses_special_file(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(InputError, match=r"metrics.jsonl is a .*; it must be a regular file"):
        JsonLines(tmp_path / "metrics.jsonl")


def test_json_lines_write_is_on_disk_immediately(tmp_path):
    file = JsonLines(tmp_path / "run" / "metrics.jsonl")
    file.write(1, "train", {"loss": 2.5})
    file.write(2, "validation", {"loss": 0.1, "tokens": 7})
    assert lines(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "split": "train", "loss": 2.5},
        {"step": 2, "split": "validation", "loss": 0.1, "tokens": 7},
    ]


def test_json_lines_time_is_seconds_since_1970(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(sinks.time, "time", lambda: 1_700_000_000.1234)
    JsonLines(path).write(1, "train", {"loss": 2.5})
    assert path.read_text() == '{"step": 1, "split": "train", "time": 1700000000.123, "loss": 2.5}\n'
    assert sinks.read_metrics(path) == [{"step": 1, "split": "train", "time": 1700000000.123, "loss": 2.5}]


def test_json_lines_roundtrip_of_nonfinite_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(1, "train", {"a": math.nan, "b": math.inf, "c": -math.inf})
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    del row["time"]
    assert row == {
        "step": 1,
        "split": "train",
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    (line,) = sinks.read_metrics(path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("appends", [True, False])
def test_truncate_after_drops_later_steps_and_unfinished_line(tmp_path, appends):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    file._appends = appends  # False: as in an object store
    for step in range(1, 6):
        file.write(step, "train", {"loss": step})
    with open(path, "a") as raw:
        raw.write('{"step": 2, "split": "tr')
    file.truncate_after(3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    file.write(4, "train", {"loss": 0})
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    file.truncate_after(-1)
    assert path.read_text() == ""
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file remains


def test_json_lines_open_drops_only_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(9, "train", {"loss": 1})
    whole = path.read_text()
    for end in range(len(whole)):
        path.write_text(whole + whole[:end])
        JsonLines(path)
        # Only the closing brace completes a line, whether or not its newline was written.
        assert path.read_text() == (whole * 2 if end == len(whole) - 1 else whole)
    path.write_text('{"st')
    JsonLines(path).write(1, "train", {})
    assert lines(path) == [{"step": 1, "split": "train"}]


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff\xfe",
        b"\x00" * 40,
        b'{"step": 1, "split": "train", "lo\xffs": 1}',
        b'{"step": 1, "split": "train", "loss": "abc"}',
        b'{"step": 1, "split": "train", "loss": {"a": [1]}}',
        b'{"step": 1, "split": "train", "loss": null}',
        b'{"step": 1, "split": "train", "loss": ' + b"[" * 100_000,
        b'{"step": 1, "split": "train", "loss": ' + b"1" * 5000 + b"}",
        b'{"step": "1", "split": "train", "loss": 1}',
        b'{"step": true, "split": "train", "loss": 1}',
        b'{"step": 1, "loss": 1}',
        b'{"step": 1, "split": 2, "loss": 1}',
        b"[1]",
        b"5",
        b'"step"',
        b"null",
    ],
    ids=lambda line: repr(line[:50]),
)
def test_damaged_lines_are_skipped_and_dropped_on_resume(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(1, "train", {"loss": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + damaged + b"\n" + whole)
    assert [row["step"] for row in sinks.read_metrics(path)] == [1, 1]
    JsonLines(path).truncate_after(1)
    assert path.read_bytes() == whole * 2
    path.write_bytes(whole + damaged)  # as the last line
    JsonLines(path).write(2, "train", {"loss": 1})
    assert [row["step"] for row in lines(path)] == [1, 2]


# TensorBoard --------------------------------------------------------------------------------------


def masked_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """Yield the events of all files in a folder, in order, verifying the records' checksums."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:
            header, (check,) = data[:8], struct.unpack("<I", data[8:12])
            (length,) = struct.unpack("<Q", header)
            body, (body_check,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
            assert (check, body_check) == (masked_crc32c(header), masked_crc32c(body))
            yield Event.FromString(body)
            data = data[16 + length :]


def scalars(folder):
    return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_tensorboard_roundtrip(tmp_path):
    board = sinks.TensorBoard(tmp_path)
    board.write(3, "train", {"loss": 2.5, "tokens": 7})
    board.close()
    assert scalars(tmp_path) == [(3, "train/loss", 2.5), (3, "train/tokens", 7.0)]
    again = sinks.TensorBoard(tmp_path)  # within the same second, but a separate file
    again.write(4, "train", {"loss": math.inf})
    again.close()
    assert sorted(scalars(tmp_path))[-1] == (4, "train/loss", math.inf)
    assert len(list(tmp_path.iterdir())) == 2


def test_tensorboard_resume_writes_session_start(tmp_path):
    sinks.TensorBoard(tmp_path, resume=20).close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [21]


# Progress -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(time=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.time)
    return now


def shown(terminal):
    out = io.StringIO()
    return out, Console(file=out, force_terminal=terminal, width=120, highlight=False, soft_wrap=True)


def test_progress_lines_are_rate_limited_and_aligned(clock):
    out, console = shown(False)
    bar = progress.Progress(2000, console=console)
    for step in range(1, 2001):
        clock.time += 0.125
        bar.write(step, "train", {"loss": 1 / step, "tokens_per_second": 123456.0})
        if step == 1000:
            bar.write(step, "validation", {"loss": 3.25, "accuracy": 0.5})
    bar.close()
    text = out.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    rows = text.splitlines()
    assert 25 <= len(rows) <= 30
    assert rows[0] == "step    1/2000  train       loss 1.0000  123.5k tokens/s  -:--:-- left"
    assert rows[1] == "step   81/2000  train       loss 0.0123  123.5k tokens/s  0:04:00 left"
    assert "step 1000/2000  validation  loss 3.2500  accuracy 0.5" in rows
    assert rows[-1] == "step 2000/2000  train       loss 0.0005  123.5k tokens/s"
    assert max(map(len, rows)) < 80


def test_progress_line_without_length_or_known_metrics(clock):
    out, console = shown(False)
    progress.Progress(None, console=console).write(5, "train", {"accuracy": 0.25, "b": 1, "c": 2, "d": 3})
    assert out.getvalue() == "step      5  train       accuracy 0.25  b 1  c 2  -:--:-- left\n"


def test_progress_bar_shows_step_loss_speed_and_time(clock):
    out, console = shown(True)
    bar = progress.Progress(100, start=40, console=console)
    bar._bar.refresh()
    assert "40/100" in out.getvalue() and "compiling" in out.getvalue()
    bar.write(50, "train", {"loss": 2.0, "tokens_per_second": 1e6})
    clock.time += 20
    bar.write(60, "train", {"loss": 1.5, "tokens_per_second": 2e6})
    bar.write(60, "validation", {"loss": 3.5})
    bar.close()
    text = out.getvalue()
    assert all(part in text for part in ("60/100", "loss 1.5000", "2.0M tokens/s", "0:01:20 left"))
    assert "step  60/100  validation  loss 3.5000" in text


# Trackers -----------------------------------------------------------------------------------------


class Recorder(types.ModuleType):
    """A module whose every function records its call."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def record(*args, **kwargs):
            self.calls.append((name, *args, kwargs))
            if name == "init":
                return self
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        return record

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for resume in (None, 1):
        config = {"model": Recorder, "model.depth": 2, "sizes": (1, 2)}
        writers = MetricWriters(
            tmp_path / "run", trackers=["wandb"], config=config, resume=resume, primary=True
        )
        writers.write(1, "train", {"loss": 0.5})
        writers.close(failed=resume == 1)
    one, two = (call[0] for call in wandb.named("init"))
    assert one == two
    assert (one["project"], one["name"], one["resume"]) == ("attnlab", "run", "allow")
    assert one["config"] == {"model": "Recorder", "model.depth": 2, "sizes": "(1,2)"}
    assert wandb.named("log") == [({"step": 1, "train/loss": 0.5}, {})] * 2
    assert [call[0]["exit_code"] for call in wandb.named("finish")] == [0, 1]


def test_mlflow_resumes_the_same_run(tmp_path, monkeypatch):
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    config = {f"field{i}": i for i in range(150)}
    for _ in range(2):
        with MetricWriters(tmp_path / "run", trackers=["mlflow"], config=config, primary=True) as writers:
            writers.write(1, "train", {"loss": 0.5})
    assert mlflow.named("set_experiment")[0] == ("mine", {})
    assert mlflow.named("start_run") == [({"run_name": "run"},), ({"run_id": "r1"},)]
    assert [len(call[0]) for call in mlflow.named("log_params")] == [100, 50]
    assert mlflow.named("log_metrics")[0] == ({"train/loss": 0.5}, {"step": 1})
    assert mlflow.named("end_run") == [({"status": "FINISHED"},)] * 2


def test_tracker_unknown_or_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        MetricWriters(tmp_path, trackers=["wandb"], primary=True)
    with pytest.raises(InputError, match="unknown tracker 'sacred': expected one of wandb, mlflow"):
        MetricWriters(tmp_path, trackers=["sacred"], primary=True)
    assert list(tmp_path.iterdir()) == []


# All sinks ----------------------------------------------------------------------------------------


def test_metric_writers_resume_drops_later_steps(tmp_path, capsys):
    with MetricWriters(tmp_path, steps=4, primary=True) as writers:
        for step in range(5):
            writers.write(step, "train", {"loss": step})
    with MetricWriters(tmp_path, steps=4, resume=2, primary=True) as writers:
        writers.write(3, "train", {"loss": 30})
    with MetricWriters(tmp_path, primary=True, progress=False) as writers:  # as an evaluation
        writers.write(1, "test", {"loss": 0})
    steps = [(line["step"], line["loss"]) for line in sinks.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (1, 0.0)]
    assert "step 4/4  train" in capsys.readouterr().out


def test_metric_writers_accept_arrays_and_reject_reserved_names(tmp_path):
    import numpy as np

    with MetricWriters(tmp_path, primary=True, progress=False) as writers:
        writers.write(np.int64(1), "train", {"loss": np.float32(0.5), "count": np.int32(3)})
        with pytest.raises(ValueError, match="cannot be called 'step'"):
            writers.write(1, "train", {"step": 1})
        with pytest.raises(ValueError, match="cannot be called 'time'"):
            writers.write(1, "train", {"time": 1})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 0.5, "count": 3.0}]


def test_metric_writers_on_other_processes_write_nothing(tmp_path, capsys):
    with MetricWriters(tmp_path, trackers=["wandb"], primary=False) as writers:
        writers.write(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_metric_writers_close_all_sinks_even_if_one_raises(tmp_path):
    writers = MetricWriters(tmp_path, primary=True, progress=False)
    writers.close()
    closed = []
    writers._sinks = [
        types.SimpleNamespace(close=closed.append),
        types.SimpleNamespace(close=lambda _: 1 / 0),
    ]
    with pytest.raises(ZeroDivisionError):
        writers.close(failed=True)
    assert closed == [True]
