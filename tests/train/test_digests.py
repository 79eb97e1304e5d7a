"""Digests: any changed bit, missing file or missing digest of a checkpoint is damage."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from attnlab.train import digests

PROCESSES = 3


@pytest.fixture
def checkpoint(tmp_path):
    """Return a folder with the files and digests of three processes."""
    folder, rng = tmp_path / "7", np.random.default_rng(0)
    names = ["_CHECKPOINT_METADATA", "metrics.json", "state/manifest", "state/d/0a", "state/empty"]
    for i in range(PROCESSES):
        names += [
            f"state/ocdbt.process_{i}/d/1b",
            f"state/array_metadatas/process_{i}",
            f"data/process_{i}_of_3",
        ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(0 if name.endswith("empty") else int(rng.integers(1, 60))))
    for i in range(PROCESSES):
        assert not digests.complete(epath.Path(folder))
        digests.write(epath.Path(folder), i, PROCESSES)
    assert digests.complete(epath.Path(folder))
    return epath.Path(folder)


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def damage(folder, readers=1):
    """Return the damage that each of several reading processes finds."""
    found = []
    for reader in range(readers):
        try:
            digests.check(folder, reader, readers)
            found.append(None)
        except digests.Damage as error:
            found.append(str(error))
    return found


def test_each_file_belongs_to_the_process_that_wrote_it(checkpoint):
    owned = {}
    for i in range(PROCESSES):
        record = json.loads((checkpoint / "digests" / f"process_{i}_of_3.json").read_text())
        owned |= dict.fromkeys(record["files"], i)
    for path in files(checkpoint):
        if path.parent.name != "digests":
            name = str(path.relative_to(checkpoint))
            assert owned.pop(name) == int((re.findall(r"process_(\d)", name) or ["0"])[0])
    assert not owned


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_every_flipped_bit_is_found_by_one_reader(checkpoint, readers):
    assert damage(checkpoint, readers) == [None] * readers
    for path in files(checkpoint):
        content = path.read_bytes()
        for byte in range(0, len(content), max(1, len(content) // 8)):
            changed = bytearray(content)
            changed[byte] ^= 1 << byte % 8
            path.write_bytes(bytes(changed))
            whitespace = path.parent.name == "digests" and not content[byte : byte + 1].strip()
            if not whitespace:
                name = str(path.relative_to(checkpoint))
                assert any(found and found.startswith(name) for found in damage(checkpoint, readers)), name
        path.write_bytes(content)
    assert damage(checkpoint, readers) == [None] * readers


def test_missing_cut_and_replaced_files_are_damage(checkpoint):
    for path in files(checkpoint):
        content, name = path.read_bytes(), str(path.relative_to(checkpoint))
        path.unlink()
        assert name in damage(checkpoint)[0]
        os.mkfifo(path)  # opening it would block
        assert name in damage(checkpoint)[0]
        path.unlink()
        path.mkdir()
        assert name in damage(checkpoint)[0]
        path.rmdir()
        path.symlink_to(path.name)  # to itself
        assert name in damage(checkpoint)[0]
        path.unlink()
        path.write_bytes(content + b" ")
        assert path.parent.name == "digests" or name in damage(checkpoint)[0]
        if content:
            path.write_bytes(content[:-1])
            assert path.parent.name == "digests" or name in damage(checkpoint)[0]
        path.write_bytes(content)
    assert damage(checkpoint) == [None]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "5", "null", '{"files": {}}', '{"sha256": 1, "files": 2}', "[" * 100_000, "\xff"]
)
def test_digests_that_are_no_list_of_digests_are_damage(checkpoint, text):
    (checkpoint / "digests" / "process_1_of_3.json").write_bytes(text.encode("latin-1"))
    assert damage(checkpoint)[0].startswith("digests/process_1_of_3.json")


@pytest.mark.parametrize(
    "extra", ["process_3_of_3.json", "process_0_of_1.json", "process_0_of_999999999.json"]
)
def test_digests_of_another_number_of_processes_are_damage(checkpoint, extra):
    (checkpoint / "digests" / extra).write_text("{}")
    assert damage(checkpoint)[0].startswith("digests/")


def test_other_files_beside_the_digests_are_ignored(checkpoint):
    for name in ("x", ".process_0_of_3.json.7.tmp", os.fsdecode(b"\xff"), "process_0_of_3.json~"):
        (checkpoint / "digests" / name).write_text("x")
    (checkpoint / "state" / os.fsdecode(b"\xfe")).write_text("x")
    assert damage(checkpoint) == [None]


def test_folder_without_digests_is_damage_of_one_line(checkpoint, tmp_path):
    (checkpoint / "digests").rmtree()
    assert damage(checkpoint) == ["digests is missing"]
    (checkpoint / "digests").mkdir()
    assert "no digests" in damage(checkpoint)[0]
    (tmp_path / "8").write_text("")
    assert damage(epath.Path(tmp_path / "8")) == ["digests is missing"]


def test_errors_of_the_storage_are_not_damage(checkpoint, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(digests, "_digest_of_part", fail)
    with pytest.raises(OSError, match="Input/output error"):
        digests.check(checkpoint)


def test_segments_cover_the_whole_file(checkpoint, monkeypatch):
    """A file of several segments: a flipped bit in each segment is found, also at its ends."""
    monkeypatch.setattr(digests, "SEGMENT", 64)
    monkeypatch.setattr(digests, "BUFFER", 48)
    for i in range(PROCESSES):
        digests.write(checkpoint, i, PROCESSES)
    for size in (63, 64, 65, 128, 200):
        content = bytes(range(200))[:size]
        (checkpoint / "metrics.json").write_bytes(content)
        digests.write(checkpoint, 0, PROCESSES)
        assert damage(checkpoint) == [None]
        assert digests.read_checked(checkpoint, "metrics.json") == content
        for byte in {0, 47, 48, 62, size - 1}:
            changed = bytearray(content)
            changed[byte] ^= 1
            (checkpoint / "metrics.json").write_bytes(bytes(changed))
            assert damage(checkpoint) == ["metrics.json differs from its digest"]


@pytest.mark.parametrize("size", [4096, 4093])
def test_changes_that_cancel_in_a_plain_sum_are_found(checkpoint, size):
    """Words that are exchanged, and bits that flip in opposite directions or twice at the top."""
    content = np.random.default_rng(0).bytes(size)
    (checkpoint / "metrics.json").write_bytes(content)
    digests.write(checkpoint, 0, PROCESSES)
    for mask in (None, 1, 0x80, 0xFF):
        changed = bytearray(content)
        if mask is None:
            changed[:4], changed[4:8] = content[4:8], content[:4]
        else:
            changed[3] ^= mask
            changed[2051] ^= mask
        (checkpoint / "metrics.json").write_bytes(bytes(changed))
        assert damage(checkpoint) == ["metrics.json differs from its digest"]


def test_digests_of_another_version_are_refused(checkpoint):
    file = checkpoint / "digests" / "process_0_of_3.json"
    record = json.loads(file.read_text())
    for entry in record["files"].values():
        entry["sha256"] = entry.pop("digest")
    record["sha256"] = digests._digest_of_json(record["files"])
    file.write_text(json.dumps(record))
    assert damage(checkpoint) == ["digests/process_0_of_3.json is of another version"]


def test_read_checked_returns_only_content_that_was_written(checkpoint):
    content = (checkpoint / "metrics.json").read_bytes()
    assert digests.read_checked(checkpoint, "metrics.json") == content
    assert digests.read_checked(checkpoint, "other.json") is None
    (checkpoint / "metrics.json").write_bytes(content[:-1] + b"\xff")
    with pytest.raises(digests.Damage, match=r"metrics\.json"):
        digests.read_checked(checkpoint, "metrics.json")
