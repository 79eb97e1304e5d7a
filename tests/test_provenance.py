"""Provenance of a run: package versions and git commits."""

import json
import platform
import subprocess
from importlib import metadata

import pytest
from etils import epath

import attnlab
from attnlab import provenance


@pytest.fixture
def checkout(tmp_path):
    """Return a git checkout with an experiment file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "toy.py").write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", "toy.py")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm", "toy")
    return folder


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def saved(workdir):
    return json.loads((workdir / "versions.json").read_text())


def test_versions_match_installed_packages():
    versions = provenance.versions()
    assert (versions.pop("attnlab"), versions.pop("python")) == (
        attnlab.__version__,
        platform.python_version(),
    )
    assert versions == {
        name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    }


def test_git_state_of_checkout(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state(checkout / "toy.py") == {"commit": commit, "dirty": False}
    (checkout / "toy.py").write_text("two\n")
    assert provenance.git_state(checkout / "toy.py") == {"commit": commit, "dirty": True}
    (checkout / "new.py").write_text("")
    assert provenance.git_state(checkout / "new.py") is None
    (tmp_path / "alone.py").write_text("")
    assert provenance.git_state(tmp_path / "alone.py") is None


def test_git_state_without_git_is_none(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(checkout / "toy.py") is None


def test_versions_file_records_each_change(checkout, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path / "run")
    provenance.save_versions(workdir, 0, epath.Path(checkout / "toy.py"))
    (first,) = saved(workdir)
    assert (first["step"], first["versions"]) == (0, provenance.versions())
    assert first["git"]["experiment"] == provenance.git_state(checkout / "toy.py")

    (workdir / "experiment.py").write_text("one\n")
    provenance.save_versions(workdir, 5, workdir / "experiment.py")  # resumes without any change
    assert saved(workdir) == [first]

    monkeypatch.setattr(attnlab, "__version__", "99.0")
    provenance.save_versions(workdir, 7, workdir / "experiment.py")
    assert saved(workdir)[0] == first
    second = saved(workdir)[1]
    assert (second["step"], second["versions"]["attnlab"]) == (7, "99.0")
    assert second["git"]["experiment"] == first["git"]["experiment"]


def test_special_versions_file_is_refused(tmp_path, refuses):
    (tmp_path / "versions.json").symlink_to("/dev/zero")
    with refuses("versions.json is a device; it must be a regular file"):
        provenance.save_versions(epath.Path(tmp_path), 0, epath.Path(tmp_path) / "toy.py")


@pytest.mark.parametrize(
    "text", ["", "{}x", "5", "[5]", '[{"versions": 1, "git": {}}]', '{"a": 1}', "[" * 99999]
)
def test_damaged_versions_file_is_named(tmp_path, text, refuses):
    (tmp_path / "versions.json").write_text(text)
    with refuses(f"{tmp_path}/versions.json is damaged; remove it to start a new record of versions"):
        provenance.save_versions(epath.Path(tmp_path), 0, epath.Path(tmp_path) / "toy.py")
