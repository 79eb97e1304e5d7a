"""Digests of the files of a checkpoint, one JSON file per process.

Each process writes the sizes and digests of the files that it wrote. A checkpoint is complete once
the digests of all processes are there, and intact if every file agrees with its digest.

Digests protect against faults, not against an attacker. They are the SHA-256 of a checksum of each
mebibyte, which costs less than half of the SHA-256 of the file. The checksum sums the words of 32
bits, each times its own odd number, modulo 2^64: every change of one word is found, and any other
change is missed with probability 2^-32 (multilinear hashing: Carter and Wegman 1979).
"""

import errno
import functools
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
from etils import epath

from attnlab.paths import is_remote, write_atomically

FOLDER = "digests"
SEGMENT = 16 << 20  # bytes hashed by one thread
BUFFER = 1 << 20  # bytes of one checksum
WORD = 4  # bytes
THREADS = min(8, os.cpu_count() or 1)
# A file that is missing or of another type is damage. Any other error is one of the storage.
DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class Damage(Exception):
    """A file of a checkpoint is missing or differs from its digest."""


def write(checkpoint: epath.Path, process: int = 0, processes: int = 1) -> None:
    """Write the sizes and digests of the files that a process wrote into a checkpoint.

    Args:
        checkpoint: the folder, in which the process has written all its files.
        process: index of the process. Process 0 also covers files that belong to no process.
        processes: number of processes that write digests.
    """
    names = [name for name in _file_names(checkpoint) if _owner(name) == process]
    sizes = [(checkpoint / name).stat().length for name in names]
    found = _digests(checkpoint, dict(zip(names, sizes, strict=True)))
    files = {n: {"size": size, "digest": found[n]} for n, size in zip(names, sizes, strict=True)}
    record = {"sha256": _digest_of_json(files), "files": files}
    write_atomically(checkpoint / FOLDER / _name(process, processes), json.dumps(record, indent=1) + "\n")


def complete(checkpoint: epath.Path) -> bool:
    """Return whether the digests of all processes are there."""
    try:
        return bool(_record_names(checkpoint))
    except Damage:
        return False


def check(checkpoint: epath.Path, process: int = 0, processes: int = 1) -> None:
    """Check that all files of a checkpoint are as they were written.

    Args:
        checkpoint: the folder.
        process: index of the process. Each checks the files of some of the writers.
        processes: number of processes that check.

    Raises:
        Damage: a file is missing or differs, or there are no digests.
        OSError: the storage cannot be read.
    """
    records = _read(checkpoint)
    expected = {n: entry for record in records[process::processes] for n, entry in record.items()}
    for name, entry in expected.items():
        _check_size(checkpoint, name, entry["size"])
    found = _digests(checkpoint, {name: entry["size"] for name, entry in expected.items()})
    for name, entry in expected.items():
        if found[name] != entry["digest"]:
            raise Damage(f"{name} differs from its digest")


def read_checked(checkpoint: epath.Path, name: str) -> bytes | None:
    """Return the content of one file of a checkpoint; None if no such file was written.

    Raises:
        Damage: the file is missing or differs, or there are no digests.
    """
    for record in _read(checkpoint):
        if entry := record.get(name):
            _check_size(checkpoint, name, entry["size"])
            content = (checkpoint / name).read_bytes()
            starts = range(0, max(len(content), 1), SEGMENT)
            if _combine([_digest_of_segment(io.BytesIO(content), i) for i in starts]) != entry["digest"]:
                raise Damage(f"{name} differs from its digest")
            return content
    return None


def _read(checkpoint: epath.Path) -> list[dict[str, Any]]:
    """Return the files of each process with their sizes and digests."""
    return [_read_record(checkpoint, f"{FOLDER}/{name}") for name in _record_names(checkpoint)]


def _record_names(checkpoint: epath.Path) -> list[str]:
    """Return the names of the files with digests, in the order of the processes."""
    folder = checkpoint / FOLDER
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        _raise_damage(error, FOLDER)
    found = sorted(name for name in names if re.fullmatch(r"process_\d{1,9}_of_\d{1,9}\.json", name))
    if not found:
        raise Damage("it has no digests; another version wrote it, or files were removed")
    count = int(re.findall(r"\d+", found[0])[1])
    expected = [_name(i, count) for i in range(min(count, len(found) + 1))]
    if missing := [name for name in expected if name not in found]:
        raise Damage(f"{FOLDER}/{missing[0]} is missing")
    if extra := [name for name in found if name not in expected]:
        raise Damage(f"{FOLDER}/{extra[0]} belongs to another number of processes")
    return expected


def _read_record(checkpoint: epath.Path, name: str) -> dict[str, Any]:
    try:
        _file_size(checkpoint, name)
        record = json.loads((checkpoint / name).read_bytes())
        files = record["files"]
        if record["sha256"] != _digest_of_json(files):
            raise Damage(f"{name} differs from its digest")
        if any(entry.keys() != {"size", "digest"} for entry in files.values()):
            raise Damage(f"{name} is of another version")
    except OSError as error:
        _raise_damage(error, name)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damage(f"{name} is not a list of digests") from error
    return files


def _check_size(checkpoint: epath.Path, name: str, size: int) -> None:
    if (actual := _file_size(checkpoint, name)) != size:
        raise Damage(f"{name} has {actual} bytes, {size} were written")


def _file_size(checkpoint: epath.Path, name: str) -> int:
    """Return the size of a regular file; opening another kind, such as a FIFO, could block."""
    path = checkpoint / name
    try:
        if is_remote(path):
            regular, size = path.is_file(), path.stat().length
        else:
            status = os.stat(path)
            regular, size = stat.S_ISREG(status.st_mode), status.st_size
    except OSError as error:
        _raise_damage(error, name)
    if not regular:
        raise Damage(f"{name} is not a file")
    return size


def _raise_damage(error: OSError, name: str) -> NoReturn:
    """Raise Damage if a file is missing, else the error of the storage."""
    if error.errno in DAMAGE_ERRNOS or isinstance(error, FileNotFoundError):
        raise Damage(f"{name} is missing") from error
    raise error


def _name(process: int, processes: int) -> str:
    return f"process_{process}_of_{processes}.json"


def _owner(name: str) -> int:
    """Return the process that wrote a file: `state/ocdbt.process_3/d/0a1b` is of process 3."""
    match = re.search(r"(?:^|[/.])process_(\d+)", name)
    return int(match[1]) if match else 0


def _file_names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yield the names of all files in a checkpoint but its digests, relative to its folder."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.is_dir():
            if name != FOLDER:
                yield from _file_names(path, f"{name}/")
        else:
            yield name


def _digests(checkpoint: epath.Path, sizes: dict[str, int]) -> dict[str, str]:
    """Return the digests of files: the SHA-256 of the digests of their segments."""
    segments = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), SEGMENT)]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(
            pool.map(lambda segment: _digest_of_part(checkpoint / segment[0], segment[1]), segments)
        )
    parts: dict[str, list[bytes]] = {name: [] for name in sizes}
    for (name, _), value in zip(segments, hashes, strict=True):
        parts[name].append(value)
    return {name: _combine(values) for name, values in parts.items()}


def _digest_of_part(path: epath.Path, start: int) -> bytes:
    with path.open("rb") as file:
        return _digest_of_segment(file, start)


def _digest_of_segment(file: io.BufferedIOBase, start: int) -> bytes:
    """Return the SHA-256 of the checksums of a segment, the last buffer padded with zeros."""
    digest, left, buffer = hashlib.sha256(), SEGMENT, bytearray(BUFFER)
    file.seek(start)
    while left and (count := file.readinto(memoryview(buffer)[: min(BUFFER, left)])):
        end = -(-count // WORD) * WORD
        buffer[count:end] = bytes(end - count)
        words = np.frombuffer(buffer, "<u4", end // WORD)
        digest.update(int(np.einsum("i,i", words, _weights()[: words.size])).to_bytes(8, "little"))
        left -= count
    return digest.digest()


@functools.cache
def _weights() -> np.ndarray:
    """Return an odd random number of 64 bits for each word of a buffer, always the same."""
    return np.frombuffer(hashlib.shake_128(b"weights").digest(BUFFER // WORD * 8), "<u8") | 1


def _combine(hashes: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
