"""Local and gs:// paths, and atomic writes: a file is never left half-written."""

import contextlib
import errno
import math
import os
import re
import shutil

from etils import epath

from attnlab.errors import InputError

CHECKPOINTS_FOLDER = "checkpoints"  # of a workdir


def resolve_path(text: str) -> epath.Path:
    """Return the path of a local file or folder, made absolute, or of a gs:// one.

    Raises:
        InputError: the name is too long or has a NUL character; or the storage is not accessible:
            the bucket does not exist, permissions are missing, or a package is not installed.
    """
    if "://" not in text:
        path = epath.Path(absolute(text))
        try:
            os.stat(path)
        except ValueError as error:  # a name with a NUL character
            raise InputError(f"{text!a} is not the name of a file: {error}") from None
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise InputError(f"{text[:60]}... cannot be used as a path: {error.strerror}") from None
        return path
    try:
        path = epath.Path(text)
        path.exists()
    except KeyError as error:
        raise InputError(f"{text}: unsupported storage; use a local folder or gs://") from error
    except ImportError as error:
        raise InputError(f'{text} requires a package: pip install "attnlab[gcs]" ({error})') from error
    except Exception as error:  # the type depends on the client library
        raise InputError(f"{text} is not accessible: {error}") from error
    return path


def absolute(text: str) -> str:
    """Return a local path as an absolute path with `~` expanded; a URL is returned unchanged."""
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path is in a bucket, which has objects and no folders."""
    return "://" in str(path)


def write_atomically(path: epath.PathLike, data: bytes | str) -> None:
    """Write `data` to `path` (local or gs://) atomically, creating its folder."""
    target = epath.Path(path)
    if is_remote(target):  # an object becomes visible only when it is complete
        target.write_bytes(data.encode() if isinstance(data, str) else data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(target)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Move a folder to a new path; in a bucket, copy its objects and delete the originals."""
    if not is_remote(source):
        shutil.move(str(source), str(target))  # also to another file system
        return
    pending = [source]
    while pending:
        path = pending.pop()
        if path.is_dir():
            pending += path.iterdir()
        else:
            write_atomically(target / str(path.relative_to(source)), path.read_bytes())
    source.rmtree()


def remove(path: epath.Path) -> None:
    """Remove a file, a symlink or a folder with its contents, if it exists."""
    if not is_remote(path) and (os.path.islink(path) or not os.path.isdir(path)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    elif path.exists():
        path.rmtree()


def numbered_entries(folder: epath.Path) -> list[int]:
    """Return the names in a folder that are decimal numbers, ascending; none without the folder.

    Raises:
        InputError: it is not a folder, or cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def as_json(value: float) -> float | str:
    """Return a number as valid JSON: NaN and infinities become strings, which `float` parses."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
