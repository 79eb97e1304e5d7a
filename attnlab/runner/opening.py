"""The first line that a run prints: the experiment, its file and the workdir."""

import os
from pathlib import Path

from etils import epath

from attnlab.config.experiments import Loaded
from attnlab.config.saved import CONFIG
from attnlab.config.types import did_you_mean
from attnlab.paths import CHECKPOINTS_FOLDER, numbered_entries


def opening_line(
    mode: str, loaded: Loaded, workdir: epath.Path | None, *, resumes: bool, default: bool
) -> str:
    """Return the first line that a run prints once all flags and fields are valid.

    Args:
        mode: the mode; the line is empty in modes other than train, import and eval.
        loaded: the experiment.
        workdir: the run's folder; None if it will be created under `runs/`.
        resumes: whether `workdir` holds a run, which may have no checkpoint yet.
        default: whether the experiment is the default one, that is, `--config` was not set.
    """
    if mode == "eval":
        return f"evaluating {loaded.name} in {_display_path(workdir)}"
    if mode not in ("train", "import"):
        return ""
    if resumes and workdir is not None and not numbered_entries(workdir / CHECKPOINTS_FOLDER):
        return f"starting {loaded.name} in {_display_path(workdir)} again: it has no checkpoint"
    if resumes:
        return f"resuming {loaded.name} in {_display_path(workdir)}"
    name = f"{loaded.name} ({_display_path(loaded.path)})"
    if mode == "import" or not default:
        return f"new run of {name}" + (f" in {_display_path(workdir)}" if workdir else "")
    if workdir is None:
        return f"new run of {name}, the default experiment; choose another with --config=NAME"
    state = "holds no run" if workdir.exists() else "does not exist"
    start = f"starting a new run of {name}, the default experiment"
    return f"{_display_path(workdir)} {state}: {start}{did_you_mean(workdir.name, _sibling_runs(workdir))}"


def _sibling_runs(workdir: epath.Path) -> list[str]:
    """Return the names of the folders with runs in the parent folder of `workdir`."""
    if "://" in str(workdir) or not workdir.parent.is_dir():
        return []
    return sorted(folder.name for folder in workdir.parent.iterdir() if (folder / CONFIG).is_file())


def _display_path(path: epath.Path | None) -> str:
    """Return a path, relative to the current folder if it is inside it."""
    if "://" not in str(path) and Path(str(path)).is_relative_to(Path.cwd()):
        return os.path.relpath(str(path))
    return str(path)
