"""Signals that stop a report, in a process alone and in a job."""

import signal

import jax
import pytest

from attnlab.signals import Terminated
from attnlab.train import stopping
from attnlab.train.stopping import stop_report


@pytest.mark.parametrize("number", stopping.STOP_SIGNALS)
def test_report_of_a_process_alone_stops_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as stopped, stop_report():
        signal.raise_signal(number)
        pytest.fail("the report went on")
    assert stopped.value.name == number.name
    assert signal.getsignal(number) is before


def test_report_of_a_job_stops_where_all_processes_agree(monkeypatch):
    votes, others = [], ["", "SIGTERM"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stopping, "agree", lambda name: votes.append(name) or others[len(votes) - 1])
    with pytest.raises(Terminated, match="SIGTERM"), stop_report() as poll:
        signal.raise_signal(signal.SIGUSR1)
        poll()  # the others do not know of the signal yet
        poll()
        pytest.fail("the report went on")
    assert votes == ["SIGUSR1", "SIGUSR1"]
