"""The command that started this process, for the commands that attnlab prints to copy."""

import os
import shlex
import shutil
import sys


def invocation(program: str | None = None) -> str:
    """Return how a shell starts attnlab as this process was started.

    `attnlab`, `python -m attnlab`, or `python run.py` with the path of `run.py` from the current folder.

    Args:
        program: the first word of the command line; None takes `sys.argv[0]`.
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
