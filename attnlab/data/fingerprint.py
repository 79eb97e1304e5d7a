"""Fingerprints of data sets, which show a resumed run that its data has changed."""

import hashlib
import numbers
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from attnlab.data.base import SPLITS, Data
from attnlab.data.tokenizer import Tokenizer
from attnlab.errors import InputError

FORMAT = 1  # increases when the same data gets another fingerprint
# Data up to these limits is hashed in full; of larger data, sizes and samples are.
FULL_BYTES, FULL_RECORDS = 2**30, 2**18
BLOCKS, BLOCK_BYTES = 16, 2**16  # of each file
SAMPLED_RECORDS = 2**12  # of each split
ENCODED_RECORDS = 4  # of each split
NAMED_CHANGES = 3  # in a message

Fingerprint = dict[str, Any]


def fingerprint(data: Data, tokenizer: Tokenizer) -> Fingerprint:
    """Return a JSON-compatible fingerprint of a data set and its preparation.

    Returns:
      "coverage" is "full" if every byte is hashed, else "sampled". "content" has an entry "SIZE
      SHA256" of each file, or of each split if the data set reads no files. "preparation" has the
      number of records of each split, with a hash of some encoded examples.
    """
    splits = {split: data.records(split) for split in SPLITS}
    files = data.files()
    coverage, content = _of_files(files) if files else _of_splits(splits)
    preparation = {split: _encoded(records, data, tokenizer) for split, records in splits.items()}
    return {"format": FORMAT, "coverage": coverage, "content": content, "preparation": preparation}


def changes(old: Fingerprint, new: Fingerprint) -> str:
    """Return what differs between two fingerprints, in one line; empty if nothing does.

    If one is full and the other is sampled, only sizes can be compared.
    """
    if old["format"] != new["format"]:
        return ""
    comparable = (lambda entry: entry) if old["coverage"] == new["coverage"] else _size
    found = []
    for name in sorted({*old["content"], *new["content"]}):
        before, after = old["content"].get(name), new["content"].get(name)
        if before is None or after is None:
            found.append(f"{name!r} was {'added' if before is None else 'removed'}")
        elif comparable(before) != comparable(after):
            sizes = f" ({_size(before)} -> {_size(after)})" if _size(before) != _size(after) else ""
            found.append(f"{name!r} has changed{sizes}")
    if not found:
        found = [
            f"examples of {split} are prepared differently"
            for split in SPLITS
            if old["preparation"].get(split) != new["preparation"].get(split)
        ]
    more = f"; and {len(found) - NAMED_CHANGES} more" if len(found) > NAMED_CHANGES else ""
    return "; ".join(found[:NAMED_CHANGES]) + more


def _size(entry: str) -> str:
    return entry.partition(" ")[0]


def _of_files(files: Mapping[str, epath.PathLike]) -> tuple[str, dict[str, str]]:
    paths = {name: epath.Path(file) for name, file in files.items()}
    sizes = {name: path.stat().length for name, path in paths.items()}
    full = sum(sizes.values()) <= FULL_BYTES
    content = {name: f"{sizes[name]} {_of_file(path, sizes[name], full)}" for name, path in paths.items()}
    return "full" if full else "sampled", content


def _of_file(path: epath.Path, size: int, full: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if full or size <= BLOCKS * BLOCK_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for start in np.linspace(0, size - BLOCK_BYTES, BLOCKS).astype(int):
                file.seek(int(start))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _of_splits(splits: Mapping[str, Sequence[Any]]) -> tuple[str, dict[str, str]]:
    if all(len(records) <= FULL_RECORDS for records in splits.values()):
        content, total = {}, 0
        for split, records in splits.items():
            digest, size = _of_records(records, range(len(records)), FULL_BYTES - total)
            content[split], total = f"{len(records)} {digest}", total + size
        if total <= FULL_BYTES:
            return "full", content
    content = {}
    for split, records in splits.items():
        digest, _ = _of_records(records, _spread(len(records), SAMPLED_RECORDS), FULL_BYTES)
        content[split] = f"{len(records)} {digest}"
    return "sampled", content


def _of_records(records: Sequence[Any], indices: Sequence[int], limit: int) -> tuple[str, int]:
    """Return the hash of some records and the number of hashed bytes, which ends above `limit`."""
    digest, size = hashlib.sha256(), 0
    for index in indices:
        for part in _bytes(records[index]):
            digest.update(part)
            size += len(part)
        if size > limit:
            break
    return digest.hexdigest(), size


def _encoded(records: Sequence[Any], data: Data, tokenizer: Tokenizer) -> str:
    """Return the number of records, and a hash of the tokens and targets of some.

    Sources and weights are left out: floating-point features differ between machines.
    """
    digest = hashlib.sha256()
    for index in _spread(len(records), ENCODED_RECORDS):
        try:
            example = data.encode(records[index], tokenizer)
        except InputError:  # a new word, for example; the run reports it when it reads the record
            digest.update(b"unreadable;")
            continue
        for array in (example.tokens, example.targets):
            digest.update(np.asarray(array).astype("<i8").tobytes() + b";")
    return f"{len(records)} {digest.hexdigest()}"


def _spread(length: int, count: int) -> list[int]:
    """Return `count` or fewer evenly spaced indices, with the first and the last."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(length, count))})


def _bytes(value: Any) -> Iterator[bytes]:
    """Yield bytes that differ between different records."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array of NumPy or JAX
        array = np.asarray(value)
        if array.dtype == object:
            yield from _bytes(array.tolist())
        else:
            yield f"{array.dtype}{array.shape}".encode()
            yield np.ascontiguousarray(array).tobytes()
    elif isinstance(value, str | bytes):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        yield f"{type(value).__name__}{len(content)}:".encode()
        yield content
    elif value is None or isinstance(value, numbers.Number):
        yield f"{type(value).__name__} {value!r};".encode()
    elif isinstance(value, Mapping):
        yield from _bytes(sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}]".encode()
        for item in value:
            yield from _bytes(item)
    elif is_dataclass(value):
        yield type(value).__name__.encode()
        yield from _bytes([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Path | epath.Path):  # a record that names its file
        yield from _bytes(str(value))
        if value.is_file():
            yield value.read_bytes()
    elif hasattr(value, "tobytes"):  # an image of Pillow
        yield from _bytes([getattr(value, "mode", None), getattr(value, "size", None), value.tobytes()])
    else:
        yield _pickled(value)


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value, protocol=4)
    except Exception:  # an object that cannot be pickled counts as its type
        return type(value).__name__.encode()
