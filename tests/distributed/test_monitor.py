"""The roll call and the watch, with several monitors in one process over real sockets."""

import socket
import threading
import time
from queue import Queue

import pytest

from attnlab.distributed.job import Job
from attnlab.distributed.monitor import Monitor
from attnlab.errors import InputError
from tests.jobs import free_port


def jobs(count, port=None):
    port = port or free_port()
    return [Job(f"localhost:{port}", count, index) for index in range(count)]


def start_all(jobs, timeout=10.0, watchdog=20.0):
    """Start a monitor of each job; returns the monitors, the errors and the lines of their ends."""
    ends, errors = [Queue() for _ in jobs], {}
    monitors = [Monitor(job, watchdog, end.put) for job, end in zip(jobs, ends, strict=True)]

    def start(index):
        try:
            monitors[index].start(timeout)
        except InputError as error:
            errors[jobs[index].process_id] = str(error)

    threads = [threading.Thread(target=start, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return monitors, errors, ends


def test_missing_processes_are_named():
    _, errors, _ = start_all([job for job in jobs(7) if job.process_id in (0, 2, 6)], timeout=1.0)
    assert sorted(errors) == [0, 2, 6]
    assert all("3 of 7 processes" in line and "missing: process 1, 3-5" in line for line in errors.values())


def test_missing_coordinator_is_named():
    (job,) = [job for job in jobs(2) if job.process_id == 1]
    _, errors, _ = start_all([job], timeout=0.5)
    assert f"process 0 did not answer at localhost, port {job.port - 1}" in errors[1]


@pytest.mark.parametrize(
    "count, index, words", [(2, 1, "both have process_id=1"), (3, 1, "num_processes=3, not 2")]
)
def test_contradicting_processes_are_refused(count, index, words):
    first = jobs(2)
    other = Job(first[0].coordinator, count, index)
    pair = [first[0], first[1], other] if count == 2 else [first[0], other]
    _, errors, _ = start_all(pair, timeout=5.0)
    assert any(words in line for line in errors.values())


def test_port_in_use_is_named():
    job = jobs(2)[0]
    with socket.create_server(("", job.port - 1)):
        _, errors, _ = start_all([job], timeout=0.5)
    assert str(job.port - 1) in errors[0] and "choose another port" in errors[0]


def test_death_ends_all_and_names_process_and_step():
    monitors, errors, ends = start_all(jobs(3))
    assert not errors
    monitors[2].progress("training", 41)
    time.sleep(1.5)
    monitors[2]._closing = True
    monitors[2]._member.connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a dead process
    for end in ends[:2]:
        line = end.get(timeout=10)
        assert "process 2 on" in line and "died" in line and "step 41" in line


def test_death_of_process_0_is_named():
    monitors, _, ends = start_all(jobs(2))
    monitors[0]._closing = True
    for connection in (monitors[0]._member.connection, monitors[1]._member.connection):
        connection.shutdown(socket.SHUT_RDWR)
    assert "process 0 on localhost died" in ends[1].get(timeout=10)


def test_stuck_process_is_the_one_with_least_progress():
    monitors, _, ends = start_all(jobs(3), watchdog=3.0)
    for step in range(1, 6):
        for index, monitor in enumerate(monitors):
            if index != 1 or step < 3:
                monitor.progress("training", step)
    line = ends[0].get(timeout=20)
    assert "process 1 on" in line and "no progress for" in line and "step 2, training" in line
    assert ends[2].get(timeout=5) == line


def test_waiting_processes_are_not_stuck_while_one_moves():
    monitors, _, ends = start_all(jobs(2), watchdog=2.0)
    for _ in range(10):
        monitors[0].progress("compiling")
        time.sleep(0.5)
    assert ends[0].empty() and ends[1].empty()


def test_regular_ends_wait_for_each_other():
    monitors, _, ends = start_all(jobs(3))
    closing = [threading.Thread(target=monitor.close, daemon=True) for monitor in monitors]
    for thread in closing[1:]:
        thread.start()
    time.sleep(2)
    assert all(thread.is_alive() for thread in closing[1:])
    closing[0].start()
    for thread in closing:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert all(end.empty() for end in ends)


def test_failure_reaches_a_process_that_has_ended():
    monitors, _, ends = start_all(jobs(2))
    threading.Thread(target=monitors[1].close, daemon=True).start()
    monitors[0].fail("disk full")
    assert "process 0 on" in (line := ends[1].get(timeout=10)) and "failed: disk full" in line


def test_failure_of_a_process_reaches_the_others():
    monitors, _, ends = start_all(jobs(2))
    monitors[1].fail("no such file: a.txt")
    assert "process 1 on" in (line := ends[0].get(timeout=10)) and "failed: no such file: a.txt" in line
