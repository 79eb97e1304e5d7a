"""Preparation of data sets that need no download, written once for all runs."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import tensorflow_datasets as tfds

from attnlab.errors import InputError, one_line

FORMAT = 1  # increases when the content of records changes, so that no cache keeps the old content
MANIFEST = "files.json"  # the hash of each prepared file
UNFINISHED, LOCK = ".preparing-", ".lock"

T = TypeVar("T", bound=tfds.core.GeneratorBasedBuilder)


def data_dir() -> Path:
    """Return the folder of prepared sets: `ATTNLAB_DATA_DIR`, else `~/.cache/attnlab/data`."""
    return Path(os.environ.get("ATTNLAB_DATA_DIR") or "~/.cache/attnlab/data").expanduser()


def prepared(builder_class: type[T]) -> T:
    """Return the builder after its files are written, or written again if they are damaged.

    The files are written to a temporary folder that is then renamed, so a killed process leaves no
    partial set. One process prepares at a time, and a second one waits and finds its set. The next
    process deletes the temporary folders of killed ones.

    Raises:
      InputError: the files cannot be written.
    """
    root = data_dir() / f"format-{FORMAT}"
    place = root / builder_class.name / str(builder_class.VERSION)
    try:
        root.mkdir(parents=True, exist_ok=True)
        whole = _is_whole(place)
        if not whole or any(root.glob(f"{UNFINISHED}*")):
            with _preparing(root, wait=not whole):
                if not whole and not _is_whole(place):
                    _write(builder_class, root, place)
    except InputError:
        raise
    except OSError as error:
        raise _not_written(root, error.strerror or str(error)) from None
    return builder_class(data_dir=root)


def _not_written(root: Path, reason: str) -> InputError:
    return InputError(f"cannot write data below {root} (set ATTNLAB_DATA_DIR): {reason}")


@contextlib.contextmanager
def _preparing(root: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of preparation, and delete the temporary folders of killed processes."""
    with (root / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is preparing, or the file system has no locks
            yield
            return
        for folder in root.glob(f"{UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)
        yield


def _is_whole(place: Path) -> bool:
    """Return whether a set is prepared and its files are undamaged."""
    try:
        if not (place / MANIFEST).exists():  # of an earlier version, without hashes
            return isinstance(json.loads((place / "dataset_info.json").read_bytes()), dict)
        return json.loads((place / MANIFEST).read_bytes()) == _hashes(place)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.iterdir()) if file.name != MANIFEST and file.is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _write(builder_class: type[T], root: Path, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root, prefix=UNFINISHED, ignore_cleanup_errors=True) as scratch:
        try:
            with _quiet():
                builder = builder_class(data_dir=scratch, file_format="array_record")
                builder.download_and_prepare()
        except (OSError, InputError):
            raise
        except Exception as error:  # of the writer of records, for example at a full disk
            raise _not_written(root, one_line(error, 300)) from error
        folder = Path(builder.data_dir)
        (folder / MANIFEST).write_text(json.dumps(_hashes(folder), indent=1))
        place.parent.mkdir(exist_ok=True)
        if place.exists():  # damaged
            shutil.rmtree(place)
        os.rename(folder, place)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and banners of TFDS."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
