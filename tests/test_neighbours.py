"""Local modules of an experiment file: found from any folder, isolated, saved with runs."""

import sys

import pytest

from attnlab import config as configs

EXPERIMENT = """
from dataclasses import dataclass
from shared import Part, describe
import numbers_beside

@dataclass(frozen=True)
class Toy:
    part: Part = Part(numbers_beside.SIZE)

def get_config():
    return Toy()

def report():
    import late
    return describe(), late.VALUE
"""
SHARED = """
from dataclasses import dataclass
import numbers_beside

@dataclass(frozen=True)
class Part:
    size: int = 0

def describe():
    return f"size {numbers_beside.SIZE}"
"""


def write(folder, size):
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text(EXPERIMENT)
    (folder / "shared.py").write_text(SHARED)
    (folder / "numbers_beside.py").write_text(f"SIZE = {size}\n")
    (folder / "late.py").write_text("VALUE = 'late'\n")
    (folder / "unused.py").write_text("raise SystemExit('nothing imports this')\n")
    return folder / "toy.py"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return write(tmp_path / "mine", 3)


def test_local_modules_are_found_from_any_folder(toy):
    loaded = configs.load(str(toy))
    assert loaded.config.part.size == 3
    assert loaded.module.report() == ("size 3", "late")
    assert set(loaded.neighbours) == {"shared", "numbers_beside", "late"}
    assert str(toy.parent) not in sys.path
    assert not {"shared", "numbers_beside", "late"} & set(sys.modules)


def test_local_modules_with_equal_names_are_isolated(toy, tmp_path):
    first, second = configs.load(str(toy)), configs.load(str(write(tmp_path / "other", 5)))
    assert (first.config.part.size, second.config.part.size) == (3, 5)
    assert (first.module.report()[0], second.module.report()[0]) == ("size 3", "size 5")


def test_edited_local_module_is_reloaded(toy):
    first = configs.load(str(toy))
    assert configs.load(str(toy)).module is first.module
    (toy.parent / "numbers_beside.py").write_text("SIZE = 4\n")
    assert configs.load(str(toy)).config.part.size == 4


def test_run_is_loaded_from_saved_copies(toy, tmp_path):
    loaded = configs.load(str(toy))
    configs.save(tmp_path / "run", loaded, loaded.config, {})
    saved = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.py"))
    assert saved == [
        "experiment.py",
        *(f"experiment/{name}.py" for name in ("late", "numbers_beside", "shared")),
    ]
    assert '"experiment.shared:Part"' in (tmp_path / "run" / "config.json").read_text()
    for file in toy.parent.iterdir():
        file.unlink()
    run = configs.load_workdir(tmp_path / "run")
    assert configs.differences(run.config, loaded.config) == []
    assert run.module.report() == ("size 3", "late")
    configs.save(tmp_path / "run", run, run.config, {})  # as a run that resumes does
    assert configs.load_workdir(tmp_path / "run").config == run.config


def test_error_in_local_module_names_its_line(toy, refuses):
    file = toy.parent / "shared.py"
    for text, message in (("SIZE = 1 / 0", "ZeroDivisionError"), ("def (", "SyntaxError")):
        file.write_text(text)
        with refuses(f"{toy}:3: {file}:1: ", message):
            configs.load(str(toy))
    file.write_text(SHARED)
    assert configs.load(str(toy)).config.part.size == 3


def test_saved_config_with_missing_local_module_is_rejected(toy, tmp_path, refuses):
    loaded = configs.load(str(toy))
    configs.save(tmp_path / "run", loaded, loaded.config, {})
    (tmp_path / "run" / "experiment.py").write_text("import json\n")
    with refuses("config.part is of type experiment.shared:Part"):
        configs.from_dict(configs.to_dict(loaded.config)["part"], path="config.part")
    with refuses("config is of type experiment:Toy"):
        configs.load_workdir(tmp_path / "run")
