"""The command that started this process, used in the commands that attnlab prints."""

import os
import shlex
import shutil
import sys

from etils import epath


def invocation(program: str | None = None) -> str:
    """Return the shell command that starts attnlab the way this process was started.

    The command is `attnlab`, `python -m attnlab`, or `python run.py` with the path of `run.py`
    relative to the current folder.

    Args:
        program: the first word of the command line; `sys.argv[0]` by default.
    """
    path = sys.argv[0] if program is None else program
    name = os.path.basename(path)
    if name == "__main__.py":
        return "python -m attnlab"
    if name.endswith(".py"):
        return f"python {shlex.quote(os.path.relpath(path))}"
    if path in (name, shutil.which(name)):
        return name
    return shlex.quote(os.path.relpath(path))


def resume_command(workdir: epath.Path) -> str:
    """Return the command that resumes a run."""
    return f"{invocation()} --workdir={shlex.quote(str(workdir))}"
