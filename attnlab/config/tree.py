"""A config as a tree: override fields by path, list the fields, compare two configs."""

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
from attnlab.errors import InputError, shorten

Config = TypeVar("Config")
Override = tuple[str, str]


def override(config: Config, path: str, text: str) -> Config:
    """Return `config` with the field at the dotted `path` set to the parsed `text`.

    Raises:
        InputError: the field does not exist, the text is not a value of its type, or a check of the
            config's constructors fails.
    """
    return override_all(config, [(path, text)])


def override_all(config: Config, overrides: Iterable[Override]) -> Config:
    """Return `config` with all pairs `(path, text)` applied in order.

    The constructors' checks run after the last one, so that `model.width=96` and `model.heads=6`
    can be given in either order.

    Raises:
        InputError: as for `override`.
    """
    overrides = list(overrides)
    changed = config
    for path, text in overrides:
        try:
            changed = _assign(changed, path.split("."), text, "config")
        except _BadValue as error:
            raise InputError(f"config.{path}={shorten(text, 300)}: {error}") from error
    return _checked(changed, config, "", overrides)


class _BadValue(Exception):
    """The text is not a value of its field, while the path is valid."""


def _assign(node: Any, path: list[str], text: str, where: str) -> Any:
    """Return a copy of the dataclass `node` with the field at `path` set, without any checks."""
    name, *rest = path
    annotations = fields_of(type(node))
    if name not in annotations:
        raise no_field(where, type(node), name)
    value = _descend(getattr(node, name), annotations[name], rest, text, f"{where}.{name}")
    node = copy.copy(node)
    object.__setattr__(node, name, value)
    return node


def _descend(value: Any, annotation: Any, rest: list[str], text: str, where: str) -> Any:
    """Return the new value of a field or tuple element whose current value is `value`."""
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
        allowed = f"0 to {len(values) - 1}" if values else "none, the tuple is empty"
        raise InputError(f"{where} has no element {index!r}; valid indices: {allowed}")
    position = int(index) % len(values)
    tuples = [member for member in members(annotation) if is_tuple(member)]
    parts = next(filter(None, (element_types(member, len(values)) for member in tuples)), [Any] * len(values))
    new = _descend(values[position], parts[position], rest, text, f"{where}.{position}")
    return (*values[:position], new, *values[position + 1 :])


def _checked(new: Any, old: Any, path: str, overrides: list[Override]) -> Any:
    """Rebuild the changed parts of `new` from the leaves up, so that constructors check them."""
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
        flags = " ".join(f"config.{p}={text}" for p, text in within or overrides)
        raise InputError(f"{flags}: {error}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Return every field by its dotted path.

    The value of a component is its class, and its fields follow as entries of their own. A tuple is
    one value, including any components in it. `override(config, path, render(value))` sets any
    entry.
    """
    flat: dict[str, Any] = {}
    for name in fields_of(type(config)):
        value, here = getattr(config, name), _join(path, name)
        flat |= {here: type(value)} | flatten(value, here) if is_config(value) else {here: value}
    return flat


def _defaults(config: Any, default: Any, path: str = "") -> dict[str, Any]:
    """Return the default value of each path of `config`; paths without a default are omitted."""
    flat: dict[str, Any] = {}
    own = {field.name: default_of(field) for field in dataclasses.fields(config)}
    for name in fields_of(type(config)):
        value, here = getattr(config, name), _join(path, name)
        # If a component has the type of its default, this default determines those of its fields.
        field_default = getattr(default, name) if type(default) is type(config) else own[name]
        if field_default is not dataclasses.MISSING:
            flat[here] = type(field_default) if is_config(field_default) else field_default
        if is_config(value):
            flat |= _defaults(value, field_default, here)
    return flat


def sources(
    config: Any, file_config: Any, flags: Iterable[str], saved: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the source of each value of `config`: "default", "file" (experiment file) or "flag".

    Args:
        config: the config with overrides applied.
        file_config: the config before overrides.
        flags: the paths that were overridden.
        saved: if `file_config` was loaded from a run, the sources saved with it.
    """
    flags, before, defaults = list(flags), flatten(file_config), _defaults(config, None)

    def source(path: str, value: Any) -> str:
        # A tuple is one entry, even if the flag set a field of one of its elements.
        within = not isinstance(value, type) and any(flag.startswith(f"{path}.") for flag in flags)
        if path in flags or within:
            return "flag"
        is_default = path in defaults and _same(defaults[path], value)
        if path in before and _same(before[path], value):
            return (saved or {}).get(path, "default" if is_default else "file")
        return "default" if is_default else "flag"  # a field of a component that a flag chose

    return {path: source(path, value) for path, value in flatten(config).items()}


def _same(a: Any, b: Any) -> bool:
    # Compared as text because a run's copy of a class and the experiment's own class differ but
    # have the same name, and because NaN is not equal to itself.
    return render(a) == render(b)


def show(config: Any, sources: Mapping[str, str]) -> str:
    """Return an aligned listing of path, value and source, one field per line."""
    rows = [(path, render(value), sources.get(path, "")) for path, value in flatten(config).items()]
    width = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return "\n".join(f"{p:<{width[0]}}  {value:<{width[1]}}  {source}".rstrip() for p, value, source in rows)


def differences(a: Any, b: Any) -> list[str]:
    """Return a line `model.depth: 12 -> 6` per field that differs; a missing one is "absent"."""
    before = {path: render(value) for path, value in flatten(a).items()}
    after = {path: render(value) for path, value in flatten(b).items()}
    return [
        f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in before | after
        if before.get(path) != after.get(path)
    ]
