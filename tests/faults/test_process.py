"""The verdicts on processes, and the table of the fault cases."""

from random import Random

import pytest

from tests.faults.__main__ import table
from tests.faults.mutate import flip, odd_bytes, odd_json
from tests.faults.process import Outcome, Result

TRACEBACK = "Traceback (most recent call last):\n  File ...\nValueError: x\n"


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome(0, "done\n", ""), "clean"),
        (Outcome(2, "", "error: no field\n"), "clean"),
        (Outcome(75, "stopped by a signal\n", ""), "clean"),
        (Outcome(130, "", "interrupted\n"), "clean"),
        (Outcome(2, "error: no field\n", ""), "not one line"),
        (Outcome(2, "", "error: no field\nand more\n"), "not one line"),
        (Outcome(1, "", ""), "not one line"),
        (Outcome(-11, "", "error: one line\n"), "not one line"),
        (Outcome(1, "", TRACEBACK), "traceback"),
        (Outcome(0, "", TRACEBACK), "traceback"),
        (Outcome(0, "", "Exception ignored in: <x>\n"), "traceback"),
        (Outcome(-9, "", "", limit="memory"), "memory"),
        (Outcome(-9, "", "", limit="hang"), "hang"),
        (
            Outcome(1, "", "error: unexpected ValueError: x; ATTNLAB_DEBUG=1 shows the traceback\n"),
            "reported",
        ),
    ],
)
def test_verdict(outcome, verdict):
    assert outcome.result("x").verdict == verdict


def test_success_with_other_parameters_is_silent():
    assert Outcome(0, "", "").result("x", silent="other parameters") == Result(
        "silent", "x", "other parameters"
    )
    assert Outcome(2, "", "error: x\n").result("x", silent="other parameters").verdict == "clean"


def test_table_counts_verdicts():
    results = [Result("clean", ""), Result("hang", ""), Result("clean", "")]
    head, row, total = table({"images": results}, {"images": 3.4}).splitlines()
    found = dict(zip(head.split()[1:3], row.split()[1:3], strict=True))
    assert found == {"tried": "3", "clean": "2"}
    assert row.split()[1:] == total.split()[2:]


def test_mutations_depend_only_on_the_seed_and_change_something():
    data = bytes(range(100))
    assert flip(b"\0\0", 1, 3) == b"\0\x08"
    assert odd_bytes(Random(1), data) == odd_bytes(Random(1), data)
    assert sum(odd_bytes(Random(i), data) != data for i in range(50)) >= 48
    value = {"a": [1, 2, {"b": "x"}], "c": None}
    assert odd_json(Random(2), value) == odd_json(Random(2), value)
    assert len({odd_json(Random(i), value) for i in range(50)}) > 25
