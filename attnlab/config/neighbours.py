"""Modules in the folder of an experiment file: `import csv_lm` finds `csv_lm.py` in that folder.

They are loaded once per experiment, as submodules of the experiment's module, so that two
experiments, or an experiment and its copy in a workdir, can have different modules of the same
name.
"""

import ast
import builtins
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath


def read_neighbours(source: bytes, folder: epath.Path) -> dict[str, bytes]:
    """Return the source of every module in `folder` that `source` imports, directly or indirectly.

    Imports inside functions count. Packages and relative imports do not.
    """
    names = _imported(source)
    if not names or not folder.is_dir():
        return {}
    files = {file.stem: file for file in folder.iterdir() if file.suffix == ".py" and file.is_file()}
    found: dict[str, bytes] = {}
    pending = sorted(names & files.keys())
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = files[name].read_bytes()
            pending += sorted(_imported(found[name]) & files.keys())
    return found


def _imported(source: bytes) -> set[str]:
    """Return the names of the modules that a file imports; empty if it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }


def install(
    module: types.ModuleType,
    neighbours: Mapping[str, bytes],
    folder: epath.Path,
    explain: Callable[[BaseException, epath.Path], Exception],
) -> None:
    """Make the imports in `module` find `neighbours` before installed packages.

    Args:
        module: the experiment, not yet executed.
        neighbours: the source of each module, by name.
        folder: the folder that holds them, for tracebacks.
        explain: converts an exception in a neighbour, given with its file, to the one to raise.
    """

    def load(name: str) -> types.ModuleType:
        full = f"{module.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        file = folder / f"{name}.py"
        neighbour = types.ModuleType(full)
        neighbour.__dict__.update(__file__=str(file), __builtins__=namespace)
        sys.modules[full] = neighbour
        try:
            exec(compile(neighbours[name], str(file), "exec"), neighbour.__dict__)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            del sys.modules[full]
            raise explain(error, file) from error
        return neighbour

    def import_(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> Any:
        if level == 0 and name in neighbours:
            return load(name)
        return builtins.__import__(name, globals, locals, fromlist, level)

    # The import statement calls `__import__` from the builtins of its module.
    namespace = builtins.__dict__ | {"__import__": import_}
    module.__dict__.update(__builtins__=namespace, __neighbours__=dict(neighbours), __load_neighbour__=load)


def neighbour_of(experiment: types.ModuleType, name: str) -> types.ModuleType:
    """Return the module named "experiment" or "experiment.NEIGHBOUR" in a saved config.

    Raises:
      ImportError: the experiment has no such neighbour.
    """
    _, dot, neighbour = name.partition(".")
    if dot and neighbour not in experiment.__dict__["__neighbours__"]:
        raise ImportError(name)
    return experiment.__dict__["__load_neighbour__"](neighbour) if dot else experiment


def forget(name: str) -> None:
    """Remove the experiment module of this name and its neighbours from `sys.modules`."""
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]
