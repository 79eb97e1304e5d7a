"""The first line of a run: which experiment starts, from which file, and in which folder."""

import os
from pathlib import Path

from etils import epath

from attnlab.config.experiments import Loaded
from attnlab.config.saved import CONFIG
from attnlab.config.types import did_you_mean


def opening_line(
    mode: str, loaded: Loaded, workdir: epath.Path | None, *, resumes: bool, default: bool
) -> str:
    """Return the first line that a run prints, after all flags and fields are checked.

    Args:
        mode: what the run does; the modes that print text or a config have no such line.
        loaded: the experiment.
        workdir: the run's folder; None if it will be made under `runs/`.
        resumes: whether `workdir` holds a run.
        default: whether no `--config` was given.
    """
    if mode == "eval":
        return f"evaluating {loaded.name} in {_shown(workdir)}"
    if mode not in ("train", "import"):
        return ""
    if resumes:
        return f"resuming {loaded.name} in {_shown(workdir)}"
    name = f"{loaded.name} ({_shown(loaded.path)})"
    if mode == "import" or not default:
        return f"new run of {name}" + (f" in {_shown(workdir)}" if workdir else "")
    if workdir is None:
        return f"new run of {name}, the default experiment; --config=NAME runs another"
    found = "holds no run" if workdir.exists() else "does not exist"
    start = f"starting a new run of {name}, the default experiment, there"
    return f"{_shown(workdir)} {found}: {start}{did_you_mean(workdir.name, _runs_beside(workdir))}"


def _runs_beside(workdir: epath.Path) -> list[str]:
    """The names of the folders beside `workdir` that hold runs."""
    if "://" in str(workdir) or not workdir.parent.is_dir():
        return []
    return sorted(folder.name for folder in workdir.parent.iterdir() if (folder / CONFIG).is_file())


def _shown(path: epath.Path | None) -> str:
    """A path relative to the current folder if it is below it, as it is otherwise."""
    if "://" not in str(path) and Path(str(path)).is_relative_to(Path.cwd()):
        return os.path.relpath(str(path))
    return str(path)
