"""Experiment files: find a file, run its `get_config`, and report its errors in one line."""

import ast
import dataclasses
import hashlib
import inspect
import io
import re
import sys
import tokenize
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

import attnlab
from attnlab.config.neighbours import forget, install, read_neighbours
from attnlab.config.types import check, did_you_mean, is_config
from attnlab.errors import InputError, one_line, shorten
from attnlab.paths import resolve_path
from attnlab.untrusted import read_bytes

FOLDER = "experiments"
MODULE_PREFIX = "attnlab_experiment_"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded experiment: its config and the file that defines it.

    Attributes:
        config: the return value of `get_config`, before overrides.
        module: the experiment file as a module; None for a saved config without an experiment file.
        path: the experiment file.
        argument: the text after the colon in `path.py:argument`.
        name: the experiment's name, such as `lm_docs`.
        source: the contents of the file when it was run.
        sources: for a saved config, the source of each value; see `config.sources`.
        mesh: for a saved config, the mesh of the last training.
        neighbours: the source of each module in the file's folder that it imports, by name.
    """

    config: Any
    module: types.ModuleType | None
    path: epath.Path
    argument: str | None = None
    name: str = "experiment"
    source: bytes = b""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mesh: str | None = None
    neighbours: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def load_file(spec: str) -> Loaded:
    """Load an experiment given as `path.py`, `path.py:argument` or a bare name.

    `find` documents where the file is searched for.

    Raises:
        InputError: the file does not exist or does not define a config.
    """
    name, argument = _split_argument(spec)
    path = find(name)
    source = read_bytes(path)
    neighbours = read_neighbours(source, path.parent)
    module = import_source(source, path, neighbours)
    config = _call_get_config(module, path, argument)
    return Loaded(config, module, path, argument, path.stem, source, neighbours=neighbours)


def _split_argument(spec: str) -> tuple[str, str | None]:
    file, suffix, argument = spec.partition(".py:")
    if suffix:
        return f"{file}.py", argument
    if re.fullmatch(r"[\w-]+:.*", spec) and "://" not in spec:
        return tuple(spec.split(":", 1))  # type: ignore[return-value]
    return spec, None


def installed_folder() -> Path:
    """Return the folder of the experiments that attnlab includes.

    In an installed wheel it is `attnlab/experiments`; in a checkout it is `experiments`, in the
    same folder as `attnlab`.
    """
    package = Path(attnlab.__file__).resolve().parent
    inside = package / FOLDER
    return inside if inside.is_dir() else package.parent / FOLDER


def available() -> dict[str, str]:
    """Return the first docstring line of each available experiment by name, without running any."""
    found: dict[str, str] = {}
    for folder in (Path.cwd() / FOLDER, installed_folder()):
        for file in sorted(folder.glob("*.py")):
            if not file.stem.startswith("_"):
                found.setdefault(file.stem, _first_line(file))
    return found


def _first_line(file: Path) -> str:
    """Return the first line of a file's docstring, without parsing the rest: `--help` has many."""
    skipped = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL)
    try:
        tokens = tokenize.tokenize(io.BytesIO(read_bytes(file)).readline)
        first = next(token for token in tokens if token.type not in skipped)
        value = ast.literal_eval(first.string) if first.type == tokenize.STRING else None
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        return f"(cannot be read: {type(error).__name__})"
    return inspect.cleandoc(value).partition("\n")[0] if isinstance(value, str) else ""


def find(name: str) -> epath.Path:
    """Return the file of an experiment.

    A path is relative to the current folder. `NAME`, `NAME.py` and `experiments/NAME.py` are
    searched for in the current folder, in its `experiments`, and among the experiments that attnlab
    includes. For a bare `NAME`, files that do not contain `get_config` are skipped.

    Raises:
        InputError: there is no such file; the message lists the available experiments.
    """
    bare = re.fullmatch(r"[\w-]+", name) is not None
    for candidate in _candidates(name):
        if candidate.suffix != ".py" or not candidate.is_file():
            continue
        if not bare or b"get_config" in read_bytes(candidate):
            return candidate
    known = available()
    hint = did_you_mean(Path(name).stem, known)
    listing = ", ".join(known) or "none here"
    raise InputError(f"no experiment file {shorten(repr(name), 300)}{hint or '.'} Experiments: {listing}")


def _candidates(name: str) -> list[epath.Path]:
    """Return the paths that `find` tries, in order."""
    if "://" in name:
        return [resolve_path(name)]
    here, installed = epath.Path(Path.cwd()), epath.Path(installed_folder())
    short = name.removeprefix(f"{FOLDER}/")
    places = [here / name, here / FOLDER / name, installed / short]
    return [epath.Path(f"{place}{suffix}") for place in places for suffix in ("", ".py")]


def import_source(
    source: bytes,
    path: epath.PathLike,
    neighbours: Mapping[str, bytes] | None = None,
    folder: epath.Path | None = None,
) -> types.ModuleType:
    """Import an experiment file as a module whose name depends only on its path.

    The module stays in `sys.modules`, where dataclasses resolve the names in their annotations. The
    same source is not run twice, so that two configs from one file have the same classes.

    Args:
        source: the contents of the file.
        path: the file.
        neighbours: the source of each module in the same folder that it imports, by name.
        folder: the folder of these modules; None for the folder of `path`.

    Raises:
        InputError: the file raises an exception.
    """
    path, neighbours = epath.Path(path), neighbours or {}
    identity = hashlib.sha256(str(path.resolve() if "://" not in str(path) else path).encode()).hexdigest()[
        :8
    ]
    name = f"{MODULE_PREFIX}{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}_{identity}"
    known = sys.modules.get(name)
    if known and (known.__dict__["__source__"], known.__dict__["__neighbours__"]) == (source, neighbours):
        return known
    forget(name)
    module = types.ModuleType(name)
    module.__dict__.update(__file__=str(path), __source__=source)
    install(module, neighbours, path.parent if folder is None else folder, format_error)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise anything
        forget(name)
        raise format_error(error, path) from error
    return module


def _call_get_config(module: types.ModuleType, path: epath.Path, argument: str | None) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise InputError(f"{path} has no function get_config")
    try:
        parameters = list(inspect.signature(get_config).parameters.values())
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: get_config must be a Python function: {error}") from error
    if argument is not None and not parameters:
        raise InputError(f"{path} takes no argument, but {argument!r} was given after the colon")
    if argument is None and any(p.default is p.empty and p.kind < p.VAR_POSITIONAL for p in parameters):
        raise InputError(f"{path} needs an argument ({parameters[0].name}): --config={path}:...")
    try:
        config = get_config() if argument is None else get_config(argument)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise format_error(error, path) from error
    if inspect.iscoroutine(config):
        config.close()  # otherwise Python warns that nothing awaited it
    if not is_config(config):
        raise InputError(f"get_config of {path} returned {type(config).__name__}, not a dataclass")
    check(config)
    return config


def format_error(error: BaseException, path: epath.Path) -> InputError:
    """Convert an exception of an experiment file to an InputError `file:line: message`."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
    near = Path(path).is_relative_to(Path.cwd()) and Path(path).relative_to(Path.cwd())
    where = f"{near or path}:{line or (lines[-1] if lines else 1)}"
    if isinstance(error, SyntaxError):
        return InputError(f"{where}: {type(error).__name__}: {shorten(str(error.msg), 1000)}")
    return InputError(f"{where}: {one_line(error, 1000)}")
