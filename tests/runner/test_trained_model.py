"""`TrainedModel` in a fast_dev_run: few batches and records, short texts and no claims."""

import dataclasses
from types import SimpleNamespace

import pytest
from etils import epath

from attnlab.runner.trained_model import FAST_BATCHES, FAST_RECORDS, FAST_TOKENS, TrainedModel


class Data:
    def records(self, split):
        return range(1000)

    def eval_batches(self, split, tokenizer, limit=None):
        return range(10 if limit is None else min(limit, 10))


@pytest.fixture
def make_trained(tmp_path):
    """Return a function that makes a `TrainedModel` without parameters, and its log lines."""

    def make(fast):
        experiment = SimpleNamespace(data=Data(), model=SimpleNamespace(source_shape=None))
        session = SimpleNamespace(experiment=experiment, tokenizer=None)
        lines = []
        return TrainedModel(session, None, epath.Path(tmp_path), log=lines.append, fast=fast), lines

    return make


def test_trained_model_reports_in_full(make_trained):
    trained, lines = make_trained(False)
    assert (len(trained.batches("validation")), len(trained.batches("validation", limit=3))) == (10, 3)
    assert len(trained.records("validation")) == 1000
    trained.claim("right", 0.5, ">=", 0.9)
    assert [claim.held for claim in trained.claims] == [False]
    assert lines == ["claim FAILS: right: 0.5 >= 0.9"]


def test_fast_trained_model_limits_report_and_checks_no_claim(make_trained, monkeypatch):
    trained, lines = make_trained(True)
    assert len(trained.batches("validation")) == len(trained.batches("validation", limit=3)) == FAST_BATCHES
    assert list(trained.records("validation")) == list(range(FAST_RECORDS))
    trained.claim("right", 0.5, ">=", 0.9)
    assert trained.claims == lines == []
    calls = []
    monkeypatch.setattr(TrainedModel, "generator", lambda self: lambda **options: calls.append(options))
    trained.generate(["a"], max_new_tokens=100)
    trained.generate(["a"], max_new_tokens=2)
    trained.generate(["a"])
    assert [options["max_new_tokens"] for options in calls] == [FAST_TOKENS, 2, FAST_TOKENS]


def test_computations_of_a_report_poll_for_signals(make_trained):
    class Stop(Exception):
        pass

    def poll():
        raise Stop

    trained = dataclasses.replace(make_trained(False)[0], poll=poll)
    for compute in (
        lambda: trained.predict(None),
        lambda: trained.apply(None, "hidden"),
        lambda: trained.attention(None),
        lambda: trained.generate(["a"]),
    ):
        with pytest.raises(Stop):
            compute()
