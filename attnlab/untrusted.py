"""The one reader of files from strangers: regular files, bounded sizes, checked JSON, typed fields.

Every reader raises `InputError`: one line with the file, the problem and the allowed values.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from attnlab.errors import InputError, one_line, shorten
from attnlab.paths import is_remote

MIB = 1 << 20
JSON_BYTES = 32 * MIB  # the index of a checkpoint with 10^5 tensors has 10 MiB
TEXT_BYTES = 64 * MIB  # the largest vocabularies in use have 35 MiB
MAX_DEPTH = 64  # nested lists and objects
MAX_DIGITS = 100  # of an integer; "no limit" is often written as 10^30
MAX_NAME = 255  # characters of a file name


@contextlib.contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """Convert every exception of the body to an `InputError` that begins with the name of a file.

    For code that interprets a file after the checks of its fields: an exception that these checks
    do not prevent is also caused by the file.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except InputError as error:
        if where in str(error):
            raise
        raise InputError(f"{where}: {error}") from error
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise InputError(f"{where}: {one_line(error, unnamed=ValueError)}") from error


# Files --------------------------------------------------------------------------------------


def read_bytes(path: epath.PathLike, limit: int = TEXT_BYTES) -> bytes:
    """Return the contents of a regular file, local or gs://.

    A symlink to a regular file is followed, because download caches consist of them. A FIFO, a
    device, a socket and a folder are refused without reading them.

    Raises:
        InputError: the file does not exist, is not regular, cannot be read, or has more than
            `limit` bytes.
    """
    path = epath.Path(path)
    try:
        data = _read_remote(path, limit) if is_remote(path) else _read_local(path, limit)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{_shown(path)} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a name with a NUL character
        raise InputError(f"{_shown(path)} cannot be read: {error}") from None
    if len(data) > limit:
        raise InputError(f"{path} is larger than the {limit:,} bytes that are allowed for this file")
    return data


def check_regular(path: epath.PathLike) -> None:
    """Check that a path is a regular file or a symlink to one, without opening it.

    Raises:
        InputError: it is a FIFO, a device, a socket or a folder, or does not exist.
    """
    path = epath.Path(path)
    if is_remote(path):
        return
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(
            f"{_shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {_kind(mode)}; it must be a regular file")


def is_regular(path: epath.PathLike, limit: int = TEXT_BYTES) -> bool:
    """Return whether a path is a regular file, or a symlink to one, of at most `limit` bytes."""
    try:
        check_regular(path)
    except InputError:
        return False
    return epath.Path(path).stat().length <= limit


def _read_remote(path: epath.Path, limit: int) -> bytes:
    if path.stat().length > limit:
        return bytes(limit + 1)
    return path.read_bytes()


def _read_local(path: epath.Path, limit: int) -> bytes:
    check_regular(path)
    # The file may be replaced after the check: O_NONBLOCK opens a FIFO without waiting.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is {_kind(mode)}; it must be a regular file")
        return file.read(limit + 1) or b""  # None: some files of /proc have no data yet


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for test, name in kinds.items() if test(mode)), "not a regular file")


def _shown(path: epath.PathLike) -> str:
    return shorten(ascii(os.fspath(path))[1:-1], 200)


def read_text(path: epath.PathLike, limit: int = TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file, with every line break as a newline, like Python's text mode.

    Raises:
        InputError: as `read_bytes`, or the file is not UTF-8.
    """
    text = decode(read_bytes(path, limit), str(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, where: str) -> str:
    """Return the text of UTF-8 bytes.

    Raises:
        InputError: the bytes are not UTF-8; the message names the position.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}"
        ) from None


def inside(folder: epath.Path, name: str) -> epath.Path:
    """Return the path of a file that another file names by a path relative to its folder.

    The file itself may be a symlink, as in download caches.

    Raises:
        InputError: the name is absolute, has a `..`, is empty or too long.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or len(part) > MAX_NAME or "\0" in part or "\\" in part for part in parts):
        raise InputError(
            f"{folder} names the file {shorten(repr(name))}; it must be a relative path inside this folder"
        )
    return folder / name


def check_link(folder: epath.Path, file: epath.Path) -> None:
    """Check that a file of a folder is in this folder, after all symlinks.

    The snapshots of a Hugging Face cache have symlinks to the cache's `blobs`, which are allowed.

    Raises:
        InputError: the file is a symlink to another folder.
    """
    if is_remote(folder):
        return
    allowed = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    target = Path(os.path.realpath(file))
    if not any(target.is_relative_to(os.path.realpath(root)) for root in allowed):
        raise InputError(f"{file} is a symlink to a file outside {folder}; only files inside it are copied")


# JSON ---------------------------------------------------------------------------------------


def read_json(path: epath.PathLike, limit: int = JSON_BYTES) -> Any:
    """Return the value of a JSON file; see `parse_json`.

    Raises:
        InputError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path))


def read_object(path: epath.PathLike, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        InputError: as `read_json`, or the value is not an object.
    """
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise InputError(f"{path} is {json_type(value)}; it must be a JSON object, {{...}}")
    return value


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON of bounded depth, without NaN, duplicate keys, or numbers that do not fit.

    Args:
        data: the JSON text.
        where: the file name for error messages.

    Raises:
        InputError: one line that names the file and the problem.
    """
    text = decode(data, where) if isinstance(data, bytes) else data

    def refuse(problem: str) -> InputError:
        return InputError(f"{where} cannot be read: {problem}")

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise refuse(f"a number has {len(digits):,} digits; at most {MAX_DIGITS} are allowed")
        return int(digits)

    def number(digits: str) -> float:
        if len(digits) > 10 * MAX_DIGITS or not math.isfinite(float(digits)):
            raise refuse(f"the number {shorten(digits)} is too large")
        return float(digits)

    def constant(name: str) -> float:
        raise refuse(f"{name} is not a JSON number")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise refuse(f"an object has the key {shorten(repr(twice))} twice")
        return fields

    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
            object_pairs_hook=mapping,
        )
    except RecursionError:
        raise refuse(f"it is nested more than {MAX_DEPTH} deep") from None
    except InputError:
        raise
    except ValueError as error:
        raise refuse(f"it is not JSON: {error}") from None
    if _depth_exceeds(value, MAX_DEPTH):
        raise refuse(f"it is nested more than {MAX_DEPTH} deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a surrogate pair is no character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise refuse("a text has an escape that is not a character") from None
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > limit:
            return True
        level = [x for part in level for x in (part.values() if isinstance(part, dict) else part)]
    return False


def json_type(value: Any) -> str:
    """Return the name of a JSON value's type, for messages."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


# Typed fields -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The values that a field may have.

    Attributes:
        description: the values in words, for the message: "an integer from 1 to 1024".
        accepts: whether a value is allowed.
    """

    description: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: "Expected") -> "Expected":
        """Return the union of two sets of values."""
        return Expected(
            f"{self.description} or {other.description}", lambda x: self.accepts(x) or other.accepts(x)
        )


def integer(low: int, high: int) -> Expected:
    """Return the integers from `low` to `high`; a boolean is no integer."""
    return Expected(f"an integer from {low:,} to {high:,}", lambda x: type(x) is int and low <= x <= high)


def number(low: float, high: float) -> Expected:
    """Return the finite numbers from `low` to `high`, integers included."""
    return Expected(
        f"a number from {low:g} to {high:g}", lambda x: type(x) in (int, float) and low <= x <= high
    )


def list_of(item: Expected, low: int = 0, high: int = 1 << 20) -> Expected:
    """Return the lists of `low` to `high` items."""
    count = f"{low}" if low == high else f"{low:,} to {high:,}"
    return Expected(
        f"a list of {count} items, each {item.description}",
        lambda x: isinstance(x, list | tuple) and low <= len(x) <= high and all(map(item.accepts, x)),
    )


def mapping_of(item: Expected, high: int = 1 << 20) -> Expected:
    """Return the objects of at most `high` items."""
    return Expected(
        f"an object whose values are {item.description}",
        lambda x: isinstance(x, Mapping) and len(x) <= high and all(map(item.accepts, x.values())),
    )


def string(length: int = 10_000) -> Expected:
    """Return the strings of at most `length` characters."""
    return Expected(
        f"a string of at most {length:,} characters", lambda x: isinstance(x, str) and len(x) <= length
    )


BOOLEAN = Expected("true or false", lambda x: isinstance(x, bool))
NULL = Expected("null", lambda x: x is None)
OBJECT = Expected("an object", lambda x: isinstance(x, Mapping))
ANYTHING = Expected("any value", lambda x: True)


def check(where: str, value: Any, expected: Expected) -> Any:
    """Return a value after checking it.

    Args:
        where: the file and the field, for the message: "config.json: hidden_size".
        value: the value.
        expected: the allowed values.

    Raises:
        InputError: the value is not allowed.
    """
    if not expected.accepts(value):
        try:
            shown = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            shown = type(value).__name__
        raise InputError(f"{where}={shorten(shown)} is not supported; it must be {expected.description}")
    return value


class Fields(Mapping[str, Any]):
    """The fields of a JSON object, checked as they are read.

    Args:
        fields: the parsed JSON object.
        where: the file name for error messages.
        expected: the allowed values of each field by name; other fields are not checked.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, expected: Mapping[str, Expected]):
        self._fields, self._where, self._expected = fields, where, expected

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise InputError(f"{self._where} lacks {name!r}")
        return check(f"{self._where}: {name}", self._fields[name], self._expected.get(name, ANYTHING))

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default if it is absent or null."""
        return default if self._fields.get(name) is None else self[name]
