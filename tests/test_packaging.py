"""The wheel contains everything a run needs and works in an empty folder without a checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import attnlab
from attnlab.runner.command import invocation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel of this checkout without a network and return its path."""
    pytest.importorskip("hatchling", reason="needs hatchling (extra `test`)")
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys, hatchling.build as h; print(h.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return a folder with the unpacked wheel, as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed: Path, cwd: Path, *arguments: str) -> str:
    """Return the stdout of a Python process that imports attnlab from the unpacked wheel."""
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_contains_only_package_and_experiments(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = {name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "attnlab").rglob("*.py")} | {"attnlab/py.typed"}
    expected |= {f"attnlab/{p.relative_to(ROOT)}" for p in (ROOT / "experiments").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    (scripts,) = (text for name, text in texts.items() if name.endswith("entry_points.txt"))
    assert re.search(r"^attnlab *= *attnlab\.runner\.cli:main$", scripts, flags=re.MULTILINE)


def test_installed_experiments_are_found_and_imported(installed, tmp_path):
    code = (
        "import attnlab.experiments.pronoun as p; from attnlab import config; l = config.load('pronoun'); "
        "f = config.load('experiments/pronoun.py'); assert l.path == f.path; print(l.path); print(p.__file__)"
    )
    file = str(installed / "attnlab" / "experiments" / "pronoun.py")
    assert python(installed, tmp_path, "-c", code).split() == [file, file]


def test_help_and_version_of_installed_package(installed, tmp_path):
    text = python(installed, tmp_path, "-m", "attnlab", "--help")
    assert "pronoun " in text
    assert "python -m attnlab --config=experiments/lm_docs.py" in text
    version = python(installed, tmp_path, "-m", "attnlab", "--version")
    assert version.startswith(f"attnlab {attnlab.__version__} (jax ")


@pytest.mark.slow
def test_installed_experiment_trains_in_empty_folder(installed, tmp_path):
    output = python(
        installed, tmp_path, "-m", "attnlab", "--config=pronoun", "--max_steps=3", "--workdir=run"
    )
    assert "python -m attnlab --workdir=" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert (tmp_path / "run" / "experiment.py").read_text() == (
        ROOT / "experiments" / "pronoun.py"
    ).read_text()


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/x/attnlab/__main__.py", "python -m attnlab"),
        ("run.py", "python run.py"),
        ("../my code/run.py", "python '../my code/run.py'"),
        ("bin/attnlab", "bin/attnlab"),
    ],
)
def test_invocation_repeats_command(program, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert invocation(program) == command


def test_invocation_of_command_on_path_is_its_name(tmp_path, monkeypatch):
    (tmp_path / "attnlab").write_text("#!/bin/sh\n")
    (tmp_path / "attnlab").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert invocation(str(tmp_path / "attnlab")) == "attnlab"


REQUIREMENTS = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_installed_versions_satisfy_requirements(requirement):
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_libraries_with_experimental_interfaces_have_upper_bounds():
    bounded = {r.name for r in REQUIREMENTS if any(s.operator == "<" for s in r.specifier)}
    assert bounded == {"grain", "orbax-checkpoint", "tensorboardX"}
