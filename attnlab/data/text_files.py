"""Local text files as a data set: `text:GLOB`."""

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnlab.errors import InputError

# A file is cut into documents of about so many bytes, at ends of lines, so that one long file still
# gives many to shuffle and to share among processes.
DOCUMENT_BYTES = 2**15
VALIDATION_SHARE = 10  # one in so many bytes, or files
FILES_TO_SPLIT_BY_FILE = 10


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a text file."""

    path: Path
    start: int
    stop: int

    def read(self) -> str:
        """The text of these bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start).decode()


class TextRecords(Sequence[dict[str, str]]):
    """Records read from their files when asked for."""

    def __init__(self, ranges: list[ByteRange]):
        self._ranges = ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index):
        byte_range = self._ranges[index]
        return {"text": byte_range.read(), "file": str(byte_range.path)}


def records(pattern: str, split: str) -> TextRecords:
    """Documents of the files that match a glob.

    Of ten files or more a tenth is for validation, chosen by a hash of their names; of fewer, the
    last tenth of each. Raises `InputError` naming the file that is missing, empty, unreadable or
    not UTF-8, and if nothing is left for validation.
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
    # By name below the root they share, so that moving the directory changes nothing.
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
    """The first end of a line from `near` on, or if that is far the end of the character there."""
    newline = content.find(b"\n", near - 1, near + DOCUMENT_BYTES // 4)
    if 0 <= newline < len(content) - 1:
        return newline + 1
    while near < len(content) and content[near] & 0xC0 == 0x80:  # inside a character
        near += 1
    return near
