"""What a run was made with: git commits, and the versions of attnlab and of the libraries it computes with.

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
from attnlab.paths import write_atomically

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
    """Return what `--version` prints: `attnlab 0.2.0 (jax 0.10.2, flax 0.12.8, Python 3.11.9)`."""
    found = versions()
    return f"attnlab {found['attnlab']} (jax {found['jax']}, flax {found['flax']}, Python {found['python']})"


def git_state(file: Path) -> dict[str, Any] | None:
    """Return the commit of the git checkout that tracks `file`, and whether its folder has changes.

    None where git does not track the file, or git is not installed.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save_versions(workdir: epath.Path, step: int, experiment: epath.Path) -> None:
    """Append to `versions.json` what the run is made with from `step` on, unless that has not changed.

    Args:
        workdir: the run's folder.
        step: the step at which the run starts or resumes.
        experiment: the experiment file; a run that resumes from its saved copy keeps the commit on record.
    """
    file = workdir / FILE
    past = json.loads(file.read_text()) if file.exists() else []
    entry: dict[str, Any] = {"step": step, "versions": versions()}
    git = {"attnlab": git_state(Path(attnlab.__file__))}
    if experiment.parent == workdir and past:
        git["experiment"] = past[-1]["git"].get("experiment")
    elif "://" not in str(experiment):
        git["experiment"] = git_state(Path(str(experiment)))
    entry["git"] = {name: state for name, state in git.items() if state}
    if not past or {**past[-1], "step": step} != entry:
        write_atomically(file, json.dumps([*past, entry], indent=2) + "\n")
