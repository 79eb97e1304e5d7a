"""Values as text: parse the text after `--config.path=`, and render a value as such text.

    12   1e-3   true   None   gelu   1,2,3   ()   Lion   Lion(learning_rate=1e-4)
    Window(256)*5,Causal

The annotation of the field determines how text is parsed: `12` is a number for an `int` and a
string for a `str`.
"""

import ast
import dataclasses
import decimal
import enum
import re
import types
import typing
from typing import Any, Literal

from attnlab.config.types import (
    MAX_INTEGER,
    choices,
    conforms,
    default_of,
    did_you_mean,
    element_types,
    expectation,
    fields_of,
    is_config,
    is_enum,
    is_tuple,
    members,
    no_field,
    short_name,
)
from attnlab.errors import InputError

BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
# Errors raised by the checks of constructors. Any other error is a bug and keeps its traceback.
VALIDATION_ERRORS = (ValueError, TypeError, ArithmeticError, AssertionError)


def parse(text: str, annotation: Any, current: Any = None) -> Any:
    """Parse `text` as a value of a field with this annotation.

    Args:
        text: the text to parse.
        annotation: the field's annotation.
        current: the field's current value. A component chosen by name keeps the values of the
            fields that it has in common with `current`.

    Raises:
        InputError: the text is not a value of this type; the message lists the allowed values.
    """
    text = text.strip()
    constructor = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text, re.DOTALL)
    named = choices(annotation)
    name = short_name(constructor[1]) if constructor else ""
    if constructor and name in named and len(split(text)) == 1:
        return construct(named[name], constructor[2] or "", current)
    # The narrowest types first: `str` accepts any text, and a one-element tuple nearly any.
    for member in sorted(members(annotation), key=_breadth):
        if member is int and float in members(annotation) and not re.fullmatch(r"[+-]?[\d_]+", text):
            continue  # in `int | float`, 1e3 is a float
        try:
            return _parse_member(text, member)
        except (ValueError, ArithmeticError) as error:
            if isinstance(error, InputError) and len(members(annotation)) == 1:
                raise
    words = constructor[1] if constructor else text
    raise InputError(f"expected {expectation(annotation)}{did_you_mean(words, _words(annotation))}")


def construct(cls: type, text: str, current: Any = None) -> Any:
    """Construct the dataclass `cls` from text such as `256, field=value`.

    `current` is as in `parse`.
    """
    known, called = fields_of(cls), short_name(cls)
    values = {
        name: getattr(current, name)
        for name, annotation in known.items()
        if is_config(current) and hasattr(current, name) and conforms(getattr(current, name), annotation)
    }
    positional = [field.name for field in dataclasses.fields(cls) if field.init and not field.kw_only]
    given: set[str] = set()
    arguments = split(text)
    if len(arguments) > len(known):
        listing = f"{len(known)} arguments: {', '.join(known)}" if known else "no arguments"
        raise InputError(f"{called} takes {listing}")
    for position, argument in enumerate(arguments):
        keyword = re.fullmatch(r"\s*(\w+)\s*=(.*)", argument, re.DOTALL)
        if not keyword and position >= len(positional):
            raise InputError(f"{called} takes its fields by name: {', '.join(known)}")
        name, value = keyword.groups() if keyword else (positional[position], argument)
        if name not in known:
            raise no_field(called, cls, name)
        if name in given:
            raise InputError(f"{called} has {name!r} given twice")
        given.add(name)
        try:
            values[name] = parse(value, known[name], getattr(current, name, None))
        except InputError as error:
            raise InputError(f"{called}.{name}={value.strip()}: {error}") from error
    required = [f.name for f in dataclasses.fields(cls) if f.init and default_of(f) is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise InputError(f"{called} needs {', '.join(missing)}, as in {called}({missing[0]}=...)")
    return construct_or_raise(cls, values)


def construct_or_raise(cls: Any, values: dict[str, Any]) -> Any:
    """Return `cls(**values)`, with the error of its own checks converted to an InputError."""
    try:
        return cls(**values)
    except VALIDATION_ERRORS as error:
        raise InputError(str(error) or type(error).__name__) from error


def _breadth(member: Any) -> int:
    order = (types.NoneType, Literal, enum.Enum, int, float, bool, tuple, str)
    kind = Literal if typing.get_origin(member) is Literal else enum.Enum if is_enum(member) else member
    kind = tuple if is_tuple(member) else kind
    return order.index(kind) if kind in order else len(order)


def _words(annotation: Any) -> list[str]:
    literals = [
        word
        for member in members(annotation)
        for word in (member.__members__ if is_enum(member) else _literals(member))
    ]
    return [*literals, *choices(annotation)]


def _literals(member: Any) -> dict[str, Any]:
    allowed = typing.get_args(member) if typing.get_origin(member) is Literal else ()
    return {str(value): value for value in allowed}


def _parse_member(text: str, member: Any) -> Any:
    """Parse text as one alternative of an annotation.

    Raises:
        ValueError: the text is not a value of this type; also ArithmeticError.
    """
    if member is types.NoneType and text in ("None", "none", "null"):
        return None
    if member is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if member in (int, float) and not text.isascii():  # digits of other scripts
        raise ValueError(text)
    if member is int:
        return _integer(text)
    if member is float:
        return float(text)
    if member is str:
        return _unquoted(text)
    if is_tuple(member):
        return _parse_tuple(text, member)
    if is_enum(member) and text in member.__members__:
        return member[text]
    if _unquoted(text) in _literals(member):
        return _literals(member)[_unquoted(text)]
    raise ValueError(text)


def _integer(text: str) -> int:
    number = decimal.Decimal(text)
    if not number.is_finite() or abs(number) > MAX_INTEGER or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        try:
            return str(ast.literal_eval(text))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return text  # the quotes are part of the text
    return text


def _parse_tuple(text: str, member: Any) -> tuple:
    pieces = split(text)
    if len(pieces) == 1 and text.startswith("(") and text.endswith(")"):
        pieces = split(text[1:-1])
    repeated: list[str] = []
    for piece in pieces:
        times = re.fullmatch(r"([^'\"].*)\*\s*(\d{1,4})", piece.strip(), re.DOTALL)
        repeated += [times[1]] * int(times[2]) if times else [piece]
    parts = element_types(member, len(repeated))
    if parts is None:
        arity = len(typing.get_args(member))
        raise InputError(f"expected {arity} values separated by commas, not {len(repeated)}")
    values = []
    for index, (piece, part) in enumerate(zip(repeated, parts, strict=True)):
        try:
            values.append(parse(piece, part))
        except InputError as error:
            raise InputError(f"element {index} is {piece.strip() or 'empty'}: {error}") from error
    return tuple(values)


def split(text: str) -> list[str]:
    """Split at commas outside brackets and quoted strings; an empty last piece is dropped."""
    pieces, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in "'\"" and pieces[-1].rstrip()[-1:] in ("", "=", "(", ","):
            quote = letter  # only at the start of a value: elsewhere it is an apostrophe
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if depth < 0:
            raise InputError(f"brackets do not match in {text!r}")
        if letter == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth or quote:
        raise InputError(f"{'brackets' if depth else 'quotes'} do not match in {text!r}")
    return pieces if pieces[-1].strip() else pieces[:-1]


def render(value: Any) -> str:
    """Return the text that `parse` parses as `value`; for a class, its short name."""
    if isinstance(value, type):
        return short_name(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str):
        return _render_string(value)
    if isinstance(value, tuple):
        return f"({','.join(map(render, value))}{',' * (len(value) == 1)})"
    if is_config(value):
        set_fields = [
            f"{field.name}={render(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
            if field.init and getattr(value, field.name) != default_of(field)
        ]
        return f"{short_name(type(value))}({','.join(set_fields)})"
    return repr(value)


def _render_string(value: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_./~$<][\w./:+\-<>|$~]*", value)
    reserved = value.lower() in ("none", "null", "nan", "inf", "infinity", *BOOLEANS)
    return value if plain and not reserved else repr(value)
