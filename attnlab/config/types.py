"""Field annotations: the classes a field can hold, and whether a value conforms."""

import dataclasses
import difflib
import enum
import inspect
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from attnlab.errors import InputError, shorten

MAX_INTEGER = 2**63 - 1  # of arrays and of the file formats
SCALARS = (bool, int, float, str, types.NoneType)


def is_config(value: object) -> bool:
    """Return whether `value` is an instance of a dataclass (and not the class itself)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(cls: type) -> dict[str, Any]:
    """Return the annotations of the dataclass fields that the constructor of `cls` takes, by name.

    Raises:
        InputError: an annotation cannot be resolved.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        raise InputError(f"{cls.__name__}: cannot resolve its annotations: {error}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def short_name(cls: type | str) -> str:
    """Return the class name without a trailing `Config`: "GatedMLP" for `GatedMLPConfig`."""
    name = cls if isinstance(cls, str) else cls.__name__
    return name.removesuffix("Config") or name


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field, or `dataclasses.MISSING`."""
    return field.default_factory() if callable(field.default_factory) else field.default


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, flattened; any other annotation is its only member."""
    if isinstance(annotation, typing.NewType):
        return members(annotation.__supertype__)
    if hasattr(annotation, "__value__"):  # `type Component = A | B`, Python 3.12
        return members(annotation.__value__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(annotation) for member in members(part))
    return (types.NoneType,) if annotation is None else (annotation,)


def is_enum(member: Any) -> bool:
    """Return whether an annotation is an Enum class."""
    return isinstance(member, type) and issubclass(member, enum.Enum)


def choices(annotation: Any) -> dict[str, type]:
    """Return the dataclasses that a field may hold by short name: annotated ones and subclasses.

    Raises:
        InputError: the names of two of them differ only in a trailing `Config`.
    """
    found: dict[str, type] = {}
    pending = list(members(annotation))
    while pending:
        cls = typing.get_origin(pending[0]) or pending[0]
        del pending[0]
        if not isinstance(cls, type) or cls in (*SCALARS, tuple, object) or is_enum(cls):
            continue
        if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls):
            other = found.setdefault(short_name(cls), cls)
            if other.__name__ != cls.__name__:
                raise InputError(
                    f"{other.__name__} and {cls.__name__} have the same short name {short_name(cls)}"
                )
            found[short_name(cls)] = cls
        pending += type.__subclasses__(cls)
    return found


def element_types(annotation: Any, length: int) -> list[Any] | None:
    """Return the annotation of each element of a tuple; None if `length` is not allowed."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return [Any] * length if annotation is tuple else [] if length == 0 else None
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [arguments[0]] * length
    return list(arguments) if len(arguments) == length else None


def is_tuple(member: Any) -> bool:
    """Return whether an annotation is `tuple` or `tuple[...]`."""
    return member is tuple or typing.get_origin(member) is tuple


def conforms(value: Any, annotation: Any) -> bool:
    """Return whether `value` conforms to `annotation`; True for unsupported annotations."""
    return any(_conforms(value, member) for member in members(annotation))


def _conforms(value: Any, member: Any) -> bool:
    if typing.get_origin(member) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(member))
    if is_tuple(member):
        if not isinstance(value, tuple):
            return False
        parts = element_types(member, len(value))
        return parts is not None and all(map(conforms, value, parts))
    if isinstance(value, bool):  # in a config, a bool is not an int
        return member in (bool, Any, object) or not isinstance(member, type)
    if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        return member not in (int, float)
    if member is float:
        return isinstance(value, int | float)
    cls = typing.get_origin(member) or member
    try:
        return isinstance(value, cls)
    except TypeError:  # Any, a protocol or a type variable cannot be checked
        return True


def expectation(annotation: Any) -> str:
    """Describe the accepted values: "int or None", "one of 'relu', 'gelu'"."""
    words: list[str] = []
    for member in members(annotation):
        if typing.get_origin(member) is Literal:
            words.append(", ".join(repr(allowed) for allowed in typing.get_args(member)))
        elif is_enum(member):
            words.append(", ".join(member.__members__))
        elif is_tuple(member):
            words.append(_tuple_expectation(member))
        elif member is types.NoneType:
            words.append("None")
        elif member is bool:
            words.append("true or false")
        elif member in SCALARS:
            words.append(member.__name__)
        elif named := choices(member):
            words += [name for name in named if name not in words]
    if len(words) > 1:
        words = [", ".join(words[:-1]), words[-1]]
    return " or ".join(words) or "a value that cannot be written as text"


def _tuple_expectation(member: Any) -> str:
    arguments = typing.get_args(member)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a tuple of ({expectation(arguments[0])})"
    return "a tuple of " + ", ".join(f"({expectation(part)})" for part in arguments)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar known word, or an empty string."""

    def similarity(name: str) -> float:
        # First letters are rarely mistyped: "atn" means "attention" rather than "pattern".
        return difflib.SequenceMatcher(None, word, name).ratio() + 0.15 * (word[:1] == name[:1])

    nearest = max(known, key=similarity, default="")
    return f"; did you mean {nearest!r}?" if nearest and similarity(nearest) >= 0.6 else ""


def no_field(where: str, cls: type, name: str) -> InputError:
    """Return the error for a field that `cls` lacks, with the most similar field and all fields."""
    known = fields_of(cls)
    hint = did_you_mean(name, known) or "."
    listing = f" Fields: {', '.join(known)}" if known else " It has no fields"
    return InputError(f"{where} has no field {name!r}{hint}{listing}")


def check(config: Any, path: str = "config") -> None:
    """Check the values of all fields, recursively, against their annotations.

    Raises:
        InputError: a value does not conform; the message names the first such field.
    """
    for name, annotation in fields_of(type(config)).items():
        value, here = getattr(config, name), f"{path}.{name}"
        check_field(here, value, annotation)
        elements = enumerate(value) if isinstance(value, tuple) else ()
        for where, part in [(here, value), *((f"{here}.{i}", element) for i, element in elements)]:
            if is_config(part):
                check(part, where)


def check_field(path: str, value: Any, annotation: Any) -> None:
    """Check one value against its annotation.

    Raises:
        InputError: the value does not conform.
    """
    if not conforms(value, annotation):
        raise InputError(f"{path}={_shown(value)}: expected {expectation(annotation)}")


def _shown(value: Any) -> str:
    """Return a value as text for a message."""
    try:
        return shorten(repr(value), 300)
    except Exception:  # more digits than Python converts, or the __repr__ of an experiment file
        return type(value).__name__
