"""Writing files so that a reader, or a killed process, never meets half of one."""

import math
import os

from etils import epath

from attnlab.errors import InputError


def resolve_path(text: str) -> epath.Path:
    """A folder or file by its name, local (then absolute) or gs://.

    Raises InputError for storage that cannot be reached: no such bucket, no rights, a missing package.
    """
    if "://" not in text:
        return epath.Path(absolute(text))
    try:
        path = epath.Path(text)
        path.exists()
    except KeyError as error:
        raise InputError(f"{text}: no such kind of storage; use a local folder or gs://") from error
    except ImportError as error:
        raise InputError(f'{text} needs a package: pip install "attnlab[gcs]" ({error})') from error
    except Exception as error:  # of whatever client library serves it
        raise InputError(f"{text} cannot be reached: {error}") from error
    return path


def absolute(text: str) -> str:
    """Return a local path as absolute text, from the current folder and with `~` expanded; a URL as it is."""
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path is in a bucket, where there are objects and no folders."""
    return "://" in str(path)


def write_atomically(path: epath.PathLike, data: bytes | str) -> None:
    """Write `data` to `path` (local or gs://) whole or not at all, making its folder."""
    target = epath.Path(path)
    if is_remote(target):  # an object appears in its bucket only when all of it is there
        target.write_bytes(data.encode() if isinstance(data, str) else data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(target)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Move a folder to a path that does not exist; in a bucket, copy its objects and delete them."""
    if not is_remote(source):
        source.rename(target)
        return
    pending = [source]
    while pending:
        path = pending.pop()
        if path.is_dir():
            pending += path.iterdir()
        else:
            write_atomically(target / str(path.relative_to(source)), path.read_bytes())
    source.rmtree()


def as_json(value: float) -> float | str:
    """A number as valid JSON: "NaN", "Infinity" and "-Infinity" are strings, which `float` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
