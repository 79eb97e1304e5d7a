"""Lines about slow steps, also of the processes of a job."""

import socket

import jax
import pytest

from attnlab.train.slow_steps import SlowSteps


@pytest.fixture
def warmed_up():
    """Return a function that makes a `SlowSteps` after ten steps of 0.1 s, one of them of 50 s."""

    def make():
        lines: list[str] = []
        slow = SlowSteps(lines.append)
        for step in range(1, 11):
            slow.add(step, 0.0, 0.0, 50.0 if step == 3 else 0.1, 0.0)
        return slow, lines

    return make


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ((0.1, 0.1, 0.05, 0), None),  # less than three times the median
        ((0.5, 0.2, 0.1, 0.1), None),  # less than a second
        ((2.0, 0.3, 0.1, 0.1), "step 11 was slow: 2.5 s, 25 times the median; 2.0 s of it waiting for input"),
        ((0.0, 2.5, 0.0, 0), "step 11 was slow: 2.5 s, 25 times the median; 2.5 s of it on the host"),
        ((0, 0, 5.0, 0), "step 10 was slow: 5.0 s, 50 times the median; 5.0 s of it waiting for the devices"),
        ((0, 0, 0, 5.0), "step 11 was slow: 5.0 s, 50 times the median; 5.0 s of it waiting for the devices"),
    ],
)
def test_slow_step_is_named_with_its_cause(warmed_up, times, line):
    slow, lines = warmed_up()
    slow.add(11, *times)
    slow.add(12, 0.0, 0.1, 0.0, 0.0)
    slow.add(13, *times)  # within a minute: counted, without a line
    assert lines == ([line] if line else [])
    assert slow.count == (2 if line else 0)


@pytest.mark.parametrize("index", [0, 3])
def test_slow_process_of_a_job_names_itself(warmed_up, monkeypatch, capsys, index):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    slow, lines = warmed_up()
    slow.add(11, 2.5, 0.0, 0.0, 0.0)
    if index:  # its stdout is closed
        lines = capsys.readouterr().err.splitlines()
    (line,) = lines
    assert line.startswith(f"process {index} on {socket.gethostname()}: step 11 was slow: 2.5 s")
    slow, lines = warmed_up()
    slow.add(11, 0.0, 0.0, 2.5, 0.0)  # it waits for the others: one line is enough
    assert len(lines) == (index == 0)
    assert capsys.readouterr().err == ""
