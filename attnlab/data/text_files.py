"""Local text files as a data set: `text:GLOB`."""

import codecs
import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnlab.errors import InputError
from attnlab.untrusted import check_regular

# Size of documents. A file is split at ends of lines, so that a single long file gives many
# documents to shuffle and to distribute over processes.
DOCUMENT_BYTES = 2**15
VALIDATION_SHARE = 10  # validation has one byte, or file, in ten
FILES_TO_SPLIT_BY_FILE = 10


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a text file."""

    path: Path
    start: int
    stop: int

    def read(self) -> str:
        """Return the text of these bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start).decode()


class TextRecords(Sequence[dict[str, str]]):
    """Records read lazily from their files."""

    def __init__(self, ranges: list[ByteRange]):
        self._ranges = ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index):
        byte_range = self._ranges[index]
        return {"text": byte_range.read(), "file": str(byte_range.path)}


def records(pattern: str, split: str) -> TextRecords:
    """Return the documents of the files that match a glob.

    With ten or more files, a hash of their names selects a tenth for validation. With fewer files,
    the last tenth of each is for validation.

    Raises:
      InputError: a file is missing, empty, unreadable or not UTF-8, or nothing is left for
        validation.
    """
    paths = _matches(pattern)
    contents = {path: _read(path) for path in paths}
    if len(paths) >= FILES_TO_SPLIT_BY_FILE:
        held_out = _held_out(paths)
        chosen = [path for path in paths if (path in held_out) == (split == "validation")]
        ranges = [
            byte_range
            for path in chosen
            for byte_range in _documents(path, contents[path], _start(contents[path]), len(contents[path]))
        ]
    else:
        ranges = []
        for path, content in contents.items():
            border = _line_end(content, len(content) - len(content) // VALIDATION_SHARE)
            ends = (_start(content), border) if split == "train" else (border, len(content))
            ranges += _documents(path, content, *ends)
    if not any(byte_range.read().strip() for byte_range in ranges):
        raise InputError(f"text:{pattern} holds too little text to leave any for {split}")
    return TextRecords(ranges)


def files(pattern: str) -> dict[str, Path]:
    """Return the files that match a glob, by their names relative to the folder that they share.

    Raises:
      InputError: no file matches.
    """
    return _relative_names(_matches(pattern))


def _relative_names(paths: list[Path]) -> dict[str, Path]:
    """Return the paths by names relative to their common root; moving the folder changes none."""
    root = os.path.commonpath([path.parent for path in paths])
    return {os.path.relpath(path, root): path for path in paths}


def _matches(pattern: str) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    _check_links(expanded)
    matches = [Path(path) for path in sorted(glob.glob(expanded, recursive=True))]
    paths = [path for path in matches if not path.is_dir()]
    if matches and not paths:
        raise InputError(f"text:{pattern} is a directory; name its files, as in text:{matches[0] / '*.txt'}")
    if not paths:
        raise InputError(f"text:{pattern} matches no file")
    return paths


def _check_links(pattern: str) -> None:
    """Check that no symlink of a folder below `**` leads back: `glob` would follow it for ever."""
    start, recursive, _ = pattern.partition("**")
    if not recursive:
        return
    for root in glob.glob(os.path.dirname(start) or "."):
        inside = {root: {os.path.realpath(root)}}  # folder -> it and the folders above it
        for folder, names, _ in os.walk(root, followlinks=True):
            names[:] = [name for name in names if not name.startswith(".")]  # `**` leaves them out
            for name in names:
                path = os.path.join(folder, name)
                real = os.path.realpath(path)
                if real in inside[folder]:
                    raise InputError(f"text:{pattern}: the symlink {path} leads to a folder above it")
                inside[path] = inside[folder] | {real}


def _read(path: Path) -> bytes:
    check_regular(path)
    try:
        # Some files of /proc have a regular type and would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            content = file.read(os.fstat(file.fileno()).st_size) or b""  # sizes in /proc are 0
        text = content.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, see byte {error.start}") from None
    if not text.removeprefix("\ufeff").strip():
        raise InputError(f"{path} is empty")
    return content


def _held_out(paths: list[Path]) -> set[Path]:
    named = _relative_names(paths)
    ranked = sorted(named, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return {named[name] for name in ranked[: len(paths) // VALIDATION_SHARE]}


def _documents(path: Path, content: bytes, start: int, stop: int) -> list[ByteRange]:
    ranges = []
    while start < stop:
        end = min(stop, _line_end(content, start + DOCUMENT_BYTES)) if stop - start > DOCUMENT_BYTES else stop
        ranges.append(ByteRange(path, start, end))
        start = end
    return ranges


def _start(content: bytes) -> int:
    """Return the first byte after the byte-order mark that Windows writes."""
    return len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0


def _line_end(content: bytes, near: int) -> int:
    """Return the first end of a line after `near`, or the end of the character if that is far."""
    newline = content.find(b"\n", near - 1, near + DOCUMENT_BYTES // 4)
    if 0 <= newline < len(content) - 1:
        return newline + 1
    while near < len(content) and content[near] & 0xC0 == 0x80:  # inside a character
        near += 1
    return near
