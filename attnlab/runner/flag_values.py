"""Parsers of flag values, and the folders that flags name."""

import datetime
import itertools
import math
import os
import re

from etils import epath

from attnlab.errors import InputError
from attnlab.paths import resolve_path


def resolve_folder(flag: str, text: str | None) -> epath.Path | None:
    """Return the absolute path that a flag names; None if the flag is not set."""
    if text is None:
        return None
    if not text:
        raise InputError(f"--{flag} is empty")
    return resolve_path(text)


def make_default_workdir(name: str) -> epath.Path:
    """Create and return a new folder `runs/NAME-TIME`.

    The folder is created here so that two runs started in the same second do not share it.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for count in itertools.count(1):
        folder = os.path.abspath(os.path.join("runs", f"{name}-{stamp}" + (f"-{count}" if count > 1 else "")))
        try:
            os.makedirs(folder)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot create {folder}: {error.strerror}; set --workdir") from error
        return epath.Path(folder)
    raise AssertionError("unreachable")


def make_writable_folder(folder: epath.Path) -> None:
    """Create a folder with its parents, and check that it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    if "://" not in str(folder) and not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} is not writable")


def parse_seconds(text: str | None) -> float | None:
    """Parse a duration such as `90`, `90s`, `5m` or `1h`."""
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(parts[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[parts[2]] if parts else 0
    if not 0 < seconds < math.inf:
        raise InputError(f"--max_time={text}: expected a duration above 0, such as 90, 90s, 5m or 1h")
    return seconds


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """Parse `start:stop`, the half-open range of steps to trace."""
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not parts or not 1 <= int(parts[1]) < int(parts[2]):
        raise InputError(f"--profile={text}: expected start:stop with 1 <= start < stop, such as 10:13")
    return int(parts[1]), int(parts[2])


def parse_checkpoint(text: str) -> str | int:
    """Parse `latest`, `best` or a step number."""
    if text in ("latest", "best"):
        return text
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"--checkpoint={text}: expected latest, best or a step")
    return int(text)


def parse_rename_rule(text: str) -> tuple[str, str]:
    """Parse `regex->replacement` into a pattern and its replacement."""
    pattern, arrow, replacement = text.partition("->")
    if not arrow:
        raise InputError(f"--init_rules={text}: expected regex->replacement")
    try:
        # Substitute once, since `re` checks the groups of a replacement only at a match. The empty
        # alternative always matches.
        re.sub(f"(?:{pattern})|", replacement, "")
    except (re.error, IndexError) as error:
        raise InputError(f"--init_rules={text}: {error}") from error
    return pattern, replacement
