"""The first line that a run prints."""

from pathlib import Path

import pytest
from etils import epath

from attnlab.config import Loaded
from attnlab.runner.opening import opening_line


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Loaded(None, None, epath.Path(tmp_path) / "experiments" / "toy.py", name="toy")


def line(toy, workdir, mode="train", resumes=False, default=True):
    return opening_line(
        mode, toy, workdir and epath.Path(workdir).absolute(), resumes=resumes, default=default
    )


def test_opening_line_of_new_run_names_experiment_and_file(toy):
    assert line(toy, "runs/a", default=False) == "new run of toy (experiments/toy.py) in runs/a"
    assert line(toy, None, default=False) == "new run of toy (experiments/toy.py)"
    assert line(toy, None) == (
        "new run of toy (experiments/toy.py), the default experiment; choose another with --config=NAME"
    )


def test_opening_line_shows_absolute_path_outside_current_folder(toy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"({tmp_path}/experiments/toy.py)" in line(toy, None)


def test_opening_line_of_existing_run(toy):
    Path("runs/a/checkpoints").mkdir(parents=True)
    assert line(toy, "runs/a", resumes=True) == "starting toy in runs/a again: it has no checkpoint"
    Path("runs/a/checkpoints/20").mkdir()
    assert line(toy, "runs/a", resumes=True) == "resuming toy in runs/a"
    assert line(toy, "runs/a", "eval", resumes=True) == "evaluating toy in runs/a"
    assert line(toy, "runs/a", "sample", resumes=True) == line(toy, None, "describe") == ""


def test_opening_line_suggests_nearest_run_for_mistyped_workdir(toy, tmp_path):
    starts = ": starting a new run of toy (experiments/toy.py), the default experiment"
    assert line(toy, "runs/prnoun") == f"runs/prnoun does not exist{starts}"
    (tmp_path / "runs" / "pronoun").mkdir(parents=True)
    assert (
        line(toy, "runs/prnoun") == f"runs/prnoun does not exist{starts}"
    )  # the similar folder holds no run
    Path("runs/pronoun/config.json").write_text("{}")
    assert line(toy, "runs/prnoun") == f"runs/prnoun does not exist{starts}; did you mean 'pronoun'?"
    Path("runs/prnoun").mkdir()
    assert line(toy, "runs/prnoun") == f"runs/prnoun holds no run{starts}; did you mean 'pronoun'?"
