"""Saving a config as JSON, and loading a run from its folder alone.

A dataclass becomes an object whose "$type" is its class, `module:Name` without a trailing `Config`
(`experiment:Name` if the experiment file defines it). A tuple becomes a list. Enums, and floats
that JSON cannot represent, become objects as well.
"""

import dataclasses
import enum
import importlib
import json
import math
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

import attnlab
from attnlab.config.experiments import MODULE_PREFIX, Loaded, import_source
from attnlab.config.neighbours import neighbour_of, read_neighbours
from attnlab.config.text import construct_or_raise
from attnlab.config.types import (
    check,
    check_field,
    default_of,
    fields_of,
    is_config,
    no_field,
    short_name,
)
from attnlab.errors import InputError, shorten
from attnlab.paths import write_atomically
from attnlab.untrusted import read_bytes, read_json

CONFIG, EXPERIMENT = "config.json", "experiment.py"
NEIGHBOURS = "experiment"  # subfolder for the modules that the experiment imports from its own folder


def to_dict(config: Any, path: str = "config") -> Any:
    """Convert a config to JSON-compatible values.

    Raises:
        InputError: a value cannot be saved; the message names its path.
    """
    if is_config(config):
        names = fields_of(type(config))
        fields = {name: to_dict(getattr(config, name), f"{path}.{name}") for name in names}
        return {"$type": _tag(type(config))} | fields
    if isinstance(config, enum.Enum):
        return {"$enum": _tag(type(config)), "name": config.name}
    if isinstance(config, tuple):
        return [to_dict(value, f"{path}.{i}") for i, value in enumerate(config)]
    if isinstance(config, float) and not math.isfinite(config):
        return {"$float": repr(float(config))}
    if isinstance(config, str) and not _is_unicode(config):
        raise InputError(f"{path}={config!a} is not Unicode text, so it cannot be saved")
    if config is None or isinstance(config, bool | int | float | str):
        return config
    allowed = "use a number, a string, a tuple or a dataclass"
    raise InputError(f"{path} is a {type(config).__name__}, which cannot be saved; {allowed}")


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded; file names that are not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tag(cls: type) -> str:
    module = cls.__module__
    if module.startswith(MODULE_PREFIX):
        _, dot, neighbour = module.partition(".")
        module = f"experiment{dot}{neighbour}"
    *outer, _ = cls.__qualname__.split(".")
    name, namesake = short_name(cls), [*outer, short_name(cls)]
    if name != cls.__name__ and _is_config_class(_attribute(sys.modules.get(cls.__module__), namesake)):
        name = cls.__name__  # another config class has the short name
    return f"{module}:{'.'.join([*outer, name])}"


def _attribute(module: Any, names: Sequence[str]) -> Any:
    """Return the nested attribute `names` of `module`, or None."""
    for name in names:
        module = getattr(module, name, None)
    return module


def _is_config_class(value: Any) -> bool:
    """Return whether `value` is a dataclass other than a Flax module, without importing Flax."""
    if not isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    return not any(base.__module__.startswith("flax.") for base in value.__mro__)


def from_dict(data: Any, experiment: types.ModuleType | None = None, path: str = "config") -> Any:
    """Rebuild a config from the result of `to_dict`. A missing field takes its default.

    Args:
        data: the JSON-compatible values.
        experiment: the module that defines the classes whose "$type" starts with "experiment:".
        path: path of `data` in the config, for error messages.

    Raises:
        InputError: this version does not have a type or a field.
    """
    if isinstance(data, list):
        return tuple(from_dict(value, experiment, f"{path}.{i}") for i, value in enumerate(data))
    if not isinstance(data, dict):
        return data
    if "$float" in data:
        return _nonfinite(data["$float"], path)
    if "$enum" in data:
        return _member(data, experiment, path)
    cls = _resolve(data.get("$type"), experiment, path)
    if not dataclasses.is_dataclass(cls):
        raise InputError(f"{path}: {data['$type']} is not a dataclass")
    given = {name: value for name, value in data.items() if name != "$type"}
    for name in given:
        if name not in fields_of(cls):
            raise no_field(f"{path} ({short_name(cls)})", cls, name)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in given and default_of(field) is dataclasses.MISSING:
            raise InputError(f"{path} ({short_name(cls)}) lacks the field {field.name!r}")
    values = {name: from_dict(value, experiment, f"{path}.{name}") for name, value in given.items()}
    for name, value in values.items():  # before the constructor, which assumes the right types
        check_field(f"{path}.{name}", value, fields_of(cls)[name])
    try:
        return construct_or_raise(cls, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _nonfinite(text: Any, path: str) -> float:
    """Return the number that a "$float" names: JSON has neither infinities nor NaN."""
    if text not in ("nan", "inf", "-inf"):
        raise InputError(f"{path}: $float is {shorten(repr(text))}; it must be one of 'nan', 'inf', '-inf'")
    return float(text)


def _member(data: dict[str, Any], experiment: types.ModuleType | None, path: str) -> enum.Enum:
    cls = _resolve(data["$enum"], experiment, path)
    name = data.get("name")
    if not issubclass(cls, enum.Enum) or not isinstance(name, str) or name not in cls.__members__:
        raise InputError(f"{path}: {data['$enum']} has no member {shorten(repr(name))}")
    return cls[name]


def _resolve(tag: Any, experiment: types.ModuleType | None, path: str) -> type:
    if not isinstance(tag, str) or ":" not in tag:
        raise InputError(f"{path} has no $type of the form 'module:Name'")
    module_name, _, name = tag.partition(":")
    of_experiment = module_name.partition(".")[0] == "experiment"
    if of_experiment and experiment is None:
        raise InputError(f"{path} is of type {tag}, but the config's folder has no {EXPERIMENT}")
    try:
        if of_experiment and experiment is not None:
            module = neighbour_of(experiment, module_name)
        else:
            module = importlib.import_module(module_name)
    except InputError:  # in a module beside the experiment
        raise
    except Exception as error:  # an imported module may raise anything
        missing = f"{path} is of type {shorten(tag)}, which this version of attnlab does not have"
        raise InputError(missing) from error
    names = name.split(".")
    found = _attribute(module, names)
    if not _is_config_class(found):
        found = _attribute(module, [*names[:-1], f"{names[-1]}Config"]) or found
    if found is None:
        raise InputError(f"{path} is of type {tag}, which this version of attnlab does not have")
    if not isinstance(found, type):
        raise InputError(f"{path}: {tag} is not a type")
    return found


def _check_library_classes(data: Any, path: str = "config") -> None:
    """Check that all types of a saved config are classes of attnlab, before any is imported.

    Raises:
        InputError: names the first other type.
    """
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in parts:
        if name in ("$type", "$enum") and not re.fullmatch(r"attnlab(\.[a-z]\w*)+:[A-Z]\w*", str(value)):
            raise InputError(
                f"{path} is of type {shorten(str(value))}; --no_experiment_code allows only attnlab's classes"
            )
        _check_library_classes(value, f"{path}.{name}")


def save(
    workdir: epath.PathLike, loaded: Loaded, config: Any, sources: Mapping[str, str], mesh: str | None = None
) -> None:
    """Write a run's `config.json`, its experiment file and the modules this imports into `workdir`.

    They suffice to restart the run with `load_workdir`. Only modules of the experiment's own folder
    are written.
    """
    workdir = epath.Path(workdir)
    record = {
        "attnlab": attnlab.__version__,
        "experiment": {"name": loaded.name, "argument": loaded.argument},
        "mesh": mesh,
        "sources": dict(sources),
        "config": to_dict(config),
    }
    # The config is written last: its presence means that the folder is complete.
    if loaded.source:
        write_atomically(workdir / EXPERIMENT, loaded.source)
    for name, source in loaded.neighbours.items():
        write_atomically(workdir / NEIGHBOURS / f"{name}.py", source)
    write_atomically(workdir / CONFIG, json.dumps(record, indent=2, allow_nan=False) + "\n")


def load_workdir(workdir: epath.PathLike, experiment_code: bool = True) -> Loaded:
    """Load the run that `save` wrote, using only the files in `workdir`.

    Args:
        workdir: the folder of the run.
        experiment_code: whether to run the experiment file of the folder. Without it, a config with
            classes other than attnlab's is refused.

    Raises:
        InputError: `workdir` contains no run, or its config cannot be loaded.
    """
    return load_saved(epath.Path(workdir) / CONFIG, experiment_code)


def load_saved(path: epath.PathLike, experiment_code: bool = True) -> Loaded:
    """Load a saved run, as `load_workdir` does, given the path of its `config.json`."""
    path = epath.Path(path)
    record = _read(path)
    source_file = path.parent / EXPERIMENT
    source = read_bytes(source_file) if experiment_code and source_file.is_file() else b""
    neighbours = read_neighbours(source, path.parent / NEIGHBOURS)
    try:
        if not experiment_code:
            _check_library_classes(record["config"])
        module = import_source(source, source_file, neighbours, path.parent / NEIGHBOURS) if source else None
        config = from_dict(record["config"], module)
        if not is_config(config):
            raise InputError("config is not an object with a $type")
        check(config)
    except InputError as error:
        raise InputError(_unreadable(path, record.get("attnlab") or "another version", error)) from error
    about = record["experiment"]
    return Loaded(
        config,
        module,
        source_file,
        about["argument"],
        about["name"],
        source,
        record["sources"],
        record.get("mesh"),
        neighbours,
    )


def _unreadable(path: epath.Path, version: str, error: InputError) -> str:
    """Return the message for a saved config that fails to load, with differing versions."""
    if version == attnlab.__version__:
        return f"{path}: {error}"
    return (
        f"{path} was written by attnlab {version} and cannot be read by attnlab {attnlab.__version__}: "
        f"{error}; start a new run"
    )


def _read(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path.parent} holds no run: it has no {path.name}")
    record = read_json(path)
    shapes = {"config": dict, "experiment": dict, "sources": dict, "mesh": str | None, "attnlab": str | None}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in shapes.items()):
        raise InputError(f"{path} is not a config that attnlab saved")
    about = record["experiment"]
    if not isinstance(about.get("name"), str) or not isinstance(about.get("argument", 0), str | None):
        raise InputError(f"{path} is not a config that attnlab saved: it does not name its experiment")
    if not all(isinstance(source, str) for source in record["sources"].values()):
        raise InputError(f"{path} is not a config that attnlab saved: a source is not a text")
    return record
