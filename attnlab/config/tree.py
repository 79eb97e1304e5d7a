"""A config as a tree: change a field by its path, list the fields, tell two configs apart."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from attnlab.config.text import construct_or_raise, parse, render
from attnlab.config.types import (
    choices,
    default_of,
    element_types,
    expectation,
    fields_of,
    is_config,
    is_tuple,
    members,
    no_field,
)
from attnlab.errors import InputError

Config = TypeVar("Config")
Override = tuple[str, str]


def override(config: Config, path: str, text: str) -> Config:
    """`config` with the field at the dotted `path` set to what `text` means for a field of its type.

    Raises InputError for a field that does not exist, a value of another type, or one that the config's own
    checks refuse.
    """
    return override_all(config, [(path, text)])


def override_all(config: Config, overrides: Iterable[Override]) -> Config:
    """`config` with every `(path, text)` applied in order, and checked when all of them are.

    Checking last is what lets `model.width=96` and `model.heads=6` be given in either order. Raises
    InputError as `override` does.
    """
    overrides = list(overrides)
    changed = config
    for path, text in overrides:
        try:
            changed = _assign(changed, path.split("."), text, "config")
        except _BadValue as error:
            raise InputError(f"config.{path}={text}: {error}") from error
    return _checked(changed, config, "", overrides)


class _BadValue(Exception):
    """A text that its field does not accept, as against a path that leads nowhere."""


def _assign(node: Any, path: list[str], text: str, where: str) -> Any:
    """A copy of the dataclass `node` with the field at `path` set; its own checks have not run yet."""
    name, *rest = path
    annotations = fields_of(type(node))
    if name not in annotations:
        raise no_field(where, type(node), name)
    value = _descend(getattr(node, name), annotations[name], rest, text, f"{where}.{name}")
    node = copy.copy(node)
    object.__setattr__(node, name, value)
    return node


def _descend(value: Any, annotation: Any, rest: list[str], text: str, where: str) -> Any:
    """The new value of a field, or of a tuple's element, that holds `value` now."""
    if not rest:
        try:
            return parse(text, annotation, value)
        except InputError as error:
            raise _BadValue(error) from error
    if is_config(value):
        return _assign(value, rest, text, where)
    if isinstance(value, tuple):
        return _assign_element(value, annotation, rest, text, where)
    here = f"{where} is {render(value)}"
    if named := choices(annotation):
        first = next(iter(named))
        raise InputError(f"{here}; choose its type first, {where}={first}: {expectation(annotation)}")
    raise InputError(f"{here} and has no fields, so no {'.'.join(rest)!r}")


def _assign_element(values: tuple, annotation: Any, rest: list[str], text: str, where: str) -> tuple:
    index, *rest = rest
    if not re.fullmatch(r"-?\d+", index) or not -len(values) <= int(index) < len(values):
        allowed = f"0 to {len(values) - 1}" if values else "none, it is empty"
        raise InputError(f"{where} has no element {index!r}; its elements are {allowed}")
    position = int(index) % len(values)
    tuples = [member for member in members(annotation) if is_tuple(member)]
    parts = next(filter(None, (element_types(member, len(values)) for member in tuples)), [Any] * len(values))
    new = _descend(values[position], parts[position], rest, text, f"{where}.{position}")
    return (*values[:position], new, *values[position + 1 :])


def _checked(new: Any, old: Any, path: str, overrides: list[Override]) -> Any:
    """`new`, rebuilt from the leaves up through its constructors wherever it is not `old`."""
    if new is old:
        return new
    if isinstance(new, tuple):
        before = old if isinstance(old, tuple) and len(old) == len(new) else (None,) * len(new)
        pairs = zip(new, before, strict=True)
        return tuple(_checked(a, b, _join(path, str(i)), overrides) for i, (a, b) in enumerate(pairs))
    if not is_config(new):
        return new
    parts = {
        name: _checked(getattr(new, name), getattr(old, name, None), _join(path, name), overrides)
        for name in fields_of(type(new))
    }
    try:
        return construct_or_raise(type(new), parts)
    except InputError as error:
        within = [(p, text) for p, text in overrides if f"{p}.".startswith(f"{path}.") or not path]
        asked = " ".join(f"config.{p}={text}" for p, text in within or overrides)
        raise InputError(f"{asked}: {error}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Every field by its dotted path. A component stands there as its class, its own fields after it.

    A tuple is one value, components in it and all: `override(config, path, render(value))` sets any entry.
    """
    flat: dict[str, Any] = {}
    for name in fields_of(type(config)):
        value, here = getattr(config, name), _join(path, name)
        flat |= {here: type(value)} | flatten(value, here) if is_config(value) else {here: value}
    return flat


def _defaults(config: Any, default: Any, path: str = "") -> dict[str, Any]:
    """What each path of `config` would hold had nobody set it; paths without a default are left out."""
    flat: dict[str, Any] = {}
    own = {field.name: default_of(field) for field in dataclasses.fields(config)}
    for name in fields_of(type(config)):
        value, here = getattr(config, name), _join(path, name)
        # The default of a whole component speaks for the fields within it, as long as its type is kept.
        usual = getattr(default, name) if type(default) is type(config) else own[name]
        if usual is not dataclasses.MISSING:
            flat[here] = type(usual) if is_config(usual) else usual
        if is_config(value):
            flat |= _defaults(value, usual, here)
    return flat


def sources(
    config: Any, file_config: Any, flags: Iterable[str], saved: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Where each value of `config` comes from: "default", "file" (the experiment set it) or "flag".

    Args:
        config: with the overrides applied.
        file_config: as the experiment's `get_config` returned it.
        flags: the paths that were overridden.
        saved: the answer of the run that `file_config` was saved by, if it was.
    """
    flags, before, defaults = list(flags), flatten(file_config), _defaults(config, None)

    def source(path: str, value: Any) -> str:
        # A tuple is one entry, also where the flag set a field of one of its elements.
        within = not isinstance(value, type) and any(flag.startswith(f"{path}.") for flag in flags)
        if path in flags or within:
            return "flag"
        usual = path in defaults and _same(defaults[path], value)
        if path in before and _same(before[path], value):
            return (saved or {}).get(path, "default" if usual else "file")
        return "default" if usual else "flag"  # it came with a component that a flag chose

    return {path: source(path, value) for path, value in flatten(config).items()}


def _same(a: Any, b: Any) -> bool:
    # As text, because a class saved by a run and the experiment's own are two classes of one name,
    # and because NaN is not equal to itself.
    return render(a) == render(b)


def show(config: Any, sources: Mapping[str, str]) -> str:
    """An aligned listing of path, value and source, a field a line."""
    rows = [(path, render(value), sources.get(path, "")) for path, value in flatten(config).items()]
    width = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return "\n".join(f"{p:<{width[0]}}  {value:<{width[1]}}  {source}".rstrip() for p, value, source in rows)


def differences(a: Any, b: Any) -> list[str]:
    """One line for each field that differs, `model.depth: 12 -> 6`; a field that is not there is "absent"."""
    before = {path: render(value) for path, value in flatten(a).items()}
    after = {path: render(value) for path, value in flatten(b).items()}
    return [
        f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in before | after
        if before.get(path) != after.get(path)
    ]
