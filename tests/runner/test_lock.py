"""The lock of a workdir, within a process and between processes."""

import fcntl
import os
import subprocess
import sys

import pytest
from etils import epath

from attnlab.runner import modes
from attnlab.runner.lock import LOCK, WorkdirInUse, exclusive
from tests.programs import call, write_tiny

# Without attnlab, whose import takes seconds.
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write('{"pid": 12, "host": "a", "since": "b"}')
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


def test_second_owner_is_refused_until_the_first_ends(tmp_path, refuses):
    with exclusive(tmp_path):
        with refuses(str(tmp_path), f"process {os.getpid()} on ", "since 20"), exclusive(tmp_path):
            pass
        with pytest.raises(WorkdirInUse), exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_lock_of_a_killed_process_is_released(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(WorkdirInUse, match="in use by process 12 on a since b"), exclusive(tmp_path):
        pass
    child.kill()
    child.communicate()
    assert (tmp_path / LOCK).exists()  # the file alone locks nothing
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_owner_that_is_unreadable_is_another_process(tmp_path, content, refuses):
    file = tmp_path / LOCK
    file.write_bytes(content)
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with refuses("in use by another process"), exclusive(tmp_path):
            pass


def test_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_bucket_is_not_locked():
    with exclusive(epath.Path("gs://bucket/run")):
        pass


def test_second_run_in_a_workdir_exits_with_the_owner(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    with exclusive(tmp_path / "run"):
        assert call("--config=tiny.py", "--workdir=run") == 2
        assert capfd.readouterr().err.startswith(
            f"error: {tmp_path}/run is in use by process {os.getpid()} on "
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_run_that_began_since_the_command_was_checked_is_not_joined(tmp_path, monkeypatch, capfd):
    """Between the check of the flags and the lock, another process may start and end a run."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)

    def configure_jax(request, num_processes):
        (tmp_path / "run" / "config.json").write_text("{}")

    monkeypatch.setattr(modes, "configure_jax", configure_jax)
    assert call("--config=tiny.py", "--workdir=run") == 2
    assert "another process has started a run in " in capfd.readouterr().err
