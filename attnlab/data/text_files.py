"""Local text files as a data set: `text:GLOB`."""

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnlab.errors import InputError

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
            for byte_range in _documents(path, contents[path], 0, len(contents[path]))
        ]
    else:
        ranges = []
        for path, content in contents.items():
            border = _line_end(content, len(content) - len(content) // VALIDATION_SHARE)
            ends = (0, border) if split == "train" else (border, len(content))
            ranges += _documents(path, content, *ends)
    if not any(byte_range.read().strip() for byte_range in ranges):
        raise InputError(f"text:{pattern} holds too little text to leave any for {split}")
    return TextRecords(ranges)


def _matches(pattern: str) -> list[Path]:
    matches = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    paths = [path for path in matches if not path.is_dir()]
    if matches and not paths:
        raise InputError(f"text:{pattern} is a directory; name its files, as in text:{matches[0] / '*.txt'}")
    if not paths:
        raise InputError(f"text:{pattern} matches no file")
    return paths


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, see byte {error.start}") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return content


def _held_out(paths: list[Path]) -> set[Path]:
    root = os.path.commonpath([path.parent for path in paths])
    # Names relative to the common root, so that moving the folder changes nothing.
    ranked = sorted(paths, key=lambda path: hashlib.sha256(os.path.relpath(path, root).encode()).digest())
    return set(ranked[: len(paths) // VALIDATION_SHARE])


def _documents(path: Path, content: bytes, start: int, stop: int) -> list[ByteRange]:
    ranges = []
    while start < stop:
        end = min(stop, _line_end(content, start + DOCUMENT_BYTES)) if stop - start > DOCUMENT_BYTES else stop
        ranges.append(ByteRange(path, start, end))
        start = end
    return ranges


def _line_end(content: bytes, near: int) -> int:
    """Return the first end of a line after `near`, or the end of the character if that is far."""
    newline = content.find(b"\n", near - 1, near + DOCUMENT_BYTES // 4)
    if 0 <= newline < len(content) - 1:
        return newline + 1
    while near < len(content) and content[near] & 0xC0 == 0x80:  # inside a character
        near += 1
    return near
