"""Errors of one line for the user, checks of the fields of configs, and exceptions as text."""

import dataclasses
import math
from typing import Any


class InputError(ValueError):
    """Invalid input. The message is one line with the field, its value and the allowed values.

    `run.py` prints only the message and exits with code 2. For library users it is an ordinary
    `ValueError`.
    """


class StorageError(Exception):
    """The storage failed again and again during a run. The message is one line with the path.

    `run.py` prints only the message and exits with code 1.
    """


def check_fields(
    config: Any,
    *names: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    under: float = math.inf,
) -> None:
    """Raise ValueError unless each of these fields of a dataclass is in the interval, or None."""
    limits = {"at least": least, "over": above, "at most": most, "under": under}
    allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value is not None and not (least <= value <= most and above < value < under):
            optional = ", or none" if "None" in str(kinds[name]) else ""
            raise ValueError(f"{name}={value} must be {allowed}{optional}")


def one_line(error: BaseException, length: int = 200, unnamed: type[BaseException] = InputError) -> str:
    """Return the type and the text of an exception in one line.

    Args:
        error: any exception, also one whose `__str__` raises.
        length: the maximum length of its text.
        unnamed: exceptions of this type are returned without their type, unless they have no text.
    """
    try:
        text = shorten(" ".join(str(error).split()), length)
    except BaseException:  # an experiment file may define such an exception
        text = ""
    name = type(error).__name__
    return text if text and isinstance(error, unnamed) else f"{name}: {text}" if text else name


def shorten(text: str, length: int = 60) -> str:
    """Return a text for a message, in one line of at most `length` characters."""
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= length else f"{text[: length - 3]}..."
