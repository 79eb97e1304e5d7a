"""Preparation of data sets that need no download, written once for all runs."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import tensorflow_datasets as tfds

from attnlab.errors import InputError

FORMAT = 1  # increases when the content of records changes, so that no cache keeps the old content

T = TypeVar("T", bound=tfds.core.GeneratorBasedBuilder)


def data_dir() -> Path:
    """Return the folder of prepared sets: `ATTNLAB_DATA_DIR`, else `~/.cache/attnlab/data`."""
    return Path(os.environ.get("ATTNLAB_DATA_DIR") or "~/.cache/attnlab/data").expanduser()


def prepared(builder_class: type[T]) -> T:
    """Return the builder after its files are written.

    The files are written to a temporary folder that is then renamed, so a killed process leaves no
    partial set, and the second of two simultaneous processes finds the set of the first.

    Raises:
      InputError: the folder cannot be written.
    """
    root = data_dir() / f"format-{FORMAT}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        place = root / builder_class.name / str(builder_class.VERSION)
        if not place.exists():
            _write(builder_class, root, place)
    except OSError as error:
        raise InputError(f"cannot write data below {root} (set ATTNLAB_DATA_DIR): {error.strerror}") from None
    return builder_class(data_dir=root)


def _write(builder_class: type[T], root: Path, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root, prefix=".preparing-") as scratch:
        with _quiet():
            builder = builder_class(data_dir=scratch, file_format="array_record")
            builder.download_and_prepare()
        place.parent.mkdir(exist_ok=True)
        try:
            os.rename(builder.data_dir, place)
        except OSError:
            if not place.exists():  # otherwise another process was first, with the same content
                raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and banners of TFDS."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
