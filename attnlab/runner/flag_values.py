"""Parsers of flag values, and the folders that flags name."""

import datetime
import itertools
import math
import os
import re

from etils import epath

from attnlab.errors import InputError, shorten
from attnlab.paths import is_remote, resolve_path

STEP = "[0-9]{1,18}"


def resolve_folder(flag: str, text: str | None) -> epath.Path | None:
    """Return the absolute path that a flag names; None if the flag is not set."""
    if text is None:
        return None
    if not text:
        raise InputError(f"--{flag} is empty")
    return resolve_path(text)


def resolve_dump_folder(text: str | None) -> epath.Path | None:
    """Return the absolute path of `--dump_hlo`, which XLA gets in the variable `XLA_FLAGS`."""
    folder = resolve_folder("dump_hlo", text)
    if folder is not None and (is_remote(folder) or re.search(r"\s", str(folder))):
        raise InputError(f"--dump_hlo={folder}: expected a local folder without spaces in its path")
    return folder


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
    except RecursionError:
        raise InputError(f"cannot create the folder {str(folder)[:60]}...: too many nested folders") from None
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    if "://" not in str(folder) and not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} is not writable")


def parse_seconds(flag: str, text: str | None) -> float | None:
    """Parse the duration of a flag, such as `90`, `90s`, `5m` or `1h`."""
    if text is None:
        return None
    parts = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)([smh]?)", text.strip())
    seconds = float(parts[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[parts[2]] if parts else 0
    if not 0 < seconds < math.inf:
        expected = "expected a duration above 0, such as 90, 90s, 5m or 1h"
        raise InputError(f"--{flag}={shorten(text)}: {expected}")
    return seconds


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """Parse `start:stop`, the half-open range of steps to trace."""
    if text is None:
        return None
    parts = re.fullmatch(f"({STEP}):({STEP})", text.strip())
    if not parts or not 1 <= int(parts[1]) < int(parts[2]):
        expected = "expected start:stop with 1 <= start < stop, such as 10:13"
        raise InputError(f"--profile={shorten(text)}: {expected}")
    return int(parts[1]), int(parts[2])


def parse_checkpoint(text: str) -> str | int:
    """Parse `latest`, `best` or a step number."""
    if text in ("latest", "best"):
        return text
    if not re.fullmatch(STEP, text):
        raise InputError(f"--checkpoint={shorten(text)}: expected latest, best or a step")
    return int(text)


def parse_mesh(text: str) -> str:
    """Check the form of a mesh: a preset, or sizes such as `data:2,fsdp:2`, of few digits each."""
    if not text.strip() or re.search("[0-9]{7}", text) or not text.isascii():
        expected = "expected a preset or sizes, such as single or data:2,fsdp:2"
        raise InputError(f"--mesh={shorten(text)}: {expected}")
    return text


def parse_rename_rule(text: str) -> tuple[str, str]:
    """Parse `regex->replacement` into a pattern and its replacement."""
    pattern, arrow, replacement = text.partition("->")
    if not arrow:
        raise InputError(f"--init_rules={text}: expected regex->replacement")
    try:
        # Substitute once, since `re` checks the groups of a replacement only at a match. The empty
        # alternative always matches.
        re.sub(f"(?:{pattern})|", replacement, "")
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"--init_rules={shorten(text)}: {error}") from error
    return pattern, replacement
