"""Provenance of a run: git commits, and the versions of attnlab and its numerical libraries.

Versions are read from package metadata, without importing the packages.
"""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath

import attnlab
from attnlab.errors import InputError
from attnlab.paths import write_atomically
from attnlab.untrusted import check_regular

FILE = "versions.json"

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of attnlab, Python and `PACKAGES`, by name."""
    installed = {name: _version(name) for name in PACKAGES}
    return {"attnlab": attnlab.__version__, "python": platform.python_version()} | installed


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version_line() -> str:
    """Return the text of `--version`: `attnlab 0.2.0 (jax 0.10.2, flax 0.12.8, Python 3.11.9)`."""
    v = versions()
    return f"attnlab {v['attnlab']} (jax {v['jax']}, flax {v['flax']}, Python {v['python']})"


def git_state(file: Path) -> dict[str, Any] | None:
    """Return the commit of the git checkout that tracks `file`, and whether its folder has changes.

    Returns None if git does not track the file or is not installed.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read_past(file: epath.Path) -> list[dict[str, Any]]:
    """Return the entries of a `versions.json`.

    Raises:
        InputError: the file is damaged.
    """
    check_regular(file)
    try:
        past = json.loads(file.read_bytes())
        if all(isinstance(entry["versions"], dict) and isinstance(entry["git"], dict) for entry in past):
            return list(past)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise InputError(f"{file} is damaged; remove it to start a new record of versions")


def save_versions(workdir: epath.Path, step: int, experiment: epath.Path) -> None:
    """Append the versions in use from `step` to the run's `versions.json`, if they have changed.

    Args:
        workdir: the run's folder.
        step: the step at which the run starts or resumes.
        experiment: the experiment file. A run that resumes from its saved copy keeps the commit
            that was recorded before.
    """
    file = workdir / FILE
    past = _read_past(file) if file.exists() else []
    entry: dict[str, Any] = {"step": step, "versions": versions()}
    git = {"attnlab": git_state(Path(attnlab.__file__))}
    if experiment.parent == workdir and past:
        git["experiment"] = past[-1]["git"].get("experiment")
    elif "://" not in str(experiment):
        git["experiment"] = git_state(Path(str(experiment)))
    entry["git"] = {name: state for name, state in git.items() if state}
    if not past or {**past[-1], "step": step} != entry:
        write_atomically(file, json.dumps([*past, entry], indent=2) + "\n")
