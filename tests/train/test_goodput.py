"""The shares of wall time."""

import time
from types import SimpleNamespace

import pytest

from attnlab.train.goodput import Goodput


def test_shares_are_those_of_the_clock(monkeypatch):
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    goodput = Goodput()
    for part, seconds in {"compile": 20, "step": 40, "input": 10, "evaluation": 5, "report": 5}.items():
        with pytest.raises(KeyError), goodput.measure(part):
            clock.now += seconds
            raise KeyError  # the time counts nevertheless
    clock.now += 20
    assert goodput.metrics() == pytest.approx(
        {
            "goodput": 0.4,
            "compile_share": 0.2,
            "input_share": 0.1,
            "checkpoint_share": 0,
            "evaluation_share": 0.05,
            "other_share": 0.2,
        }
    )
    assert str(goodput) == (
        "goodput 40.0% of 100 s; compile 20.0%, input 10.0%, checkpoint 0.0%, evaluation 5.0%, "
        "report 5.0%, other 20.0%"
    )
