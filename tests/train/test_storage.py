"""Writes are repeated when the storage fails, a bounded number of times."""

import errno
import os

import pytest

from attnlab.errors import StorageError
from attnlab.train import storage
from attnlab.train.metrics import JsonLines, TensorBoard


@pytest.fixture
def delays(monkeypatch):
    """Return the delays, which do not wait."""
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


def failing(number, times):
    """Return a function that fails the first times it is called, then returns 42."""
    calls = []

    def write():
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return 42

    return write


def test_retry_waits_longer_each_time_and_warns(delays, capsys):
    assert storage.retry(failing(errno.EIO, 2), "/runs/a/x") == 42
    assert delays == [1.0, 4.0]
    assert capsys.readouterr().out.splitlines() == [
        f"warning: /runs/a/x could not be written: Input/output error; trying again in {n} s" for n in (1, 4)
    ]


def test_retry_gives_up_in_one_line(delays):
    with pytest.raises(StorageError, match=r"^/runs/a/x could not be written 4 times: No space left on dev"):
        storage.retry(failing(errno.ENOSPC, 99), "/runs/a/x")
    assert delays == list(storage.RETRY_DELAYS)


def test_retry_does_not_repeat_a_permanent_error(delays):
    with pytest.raises(PermissionError):
        storage.retry(failing(errno.EACCES, 1), "/runs/a/x")
    assert delays == []


@pytest.mark.parametrize("make", [JsonLines, TensorBoard])
def test_partly_written_metrics_are_written_once(tmp_path, monkeypatch, delays, capsys, make):
    """The disk takes a part of the row, then it is full, and then it has space again."""
    rows = {}
    for name in ("undisturbed", "disturbed"):
        sink = make(tmp_path / name)
        monkeypatch.setattr("time.time", lambda: 1.0)
        sink.write(1, "train", {"loss": 1.0})
        file = sink._path
        before = file.read_bytes()
        if name == "disturbed":
            monkeypatch.setattr(storage, "open", full_once(), raising=False)
        sink.write(2, "train", {"loss": 2.0})
        rows[name] = file.read_bytes().removeprefix(before)
        sink.write(3, "train", {"loss": 3.0})
    assert rows["undisturbed"] == rows["disturbed"] != b""
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'disturbed'}") and "No space left on device" in line


def full_once():
    """Return an `open` whose first file takes five bytes and then reports a full disk."""
    opened = []

    class Full:
        def __init__(self, file):
            self.file, self.writes = file, 0
            self.seek, self.truncate = file.seek, file.truncate

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.writes += 1
            if self.writes > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[:5])

    def open_(*arguments, **options):
        opened.append(arguments)
        file = open(*arguments, **options)  # noqa: SIM115 - closed by its user
        return Full(file) if len(opened) == 1 else file

    return open_
