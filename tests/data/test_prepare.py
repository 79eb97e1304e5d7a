"""Preparation survives kills, full disks and damaged files."""

import errno
import fcntl
import json
import shutil

import pytest
import tensorflow_datasets as tfds

from attnlab.data import prepare
from attnlab.data.prepare import MANIFEST, prepared


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Three records."""

    VERSION = tfds.core.Version("1.0.0")
    fail = None

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            if Small.fail and i == 1:
                raise Small.fail
            yield i, {"text": f"text {i}"}


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLAB_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(Small, "fail", None)
    return tmp_path / "format-1"


def texts():
    source = prepared(Small).as_data_source(split="train")
    return sorted(source[i]["text"].decode() for i in range(len(source)))


TEXTS = ["text 0", "text 1", "text 2"]


def test_leftovers_of_killed_processes_are_deleted(root):
    for state in ("before", "after"):
        (root / f".preparing-{state}" / "small").mkdir(parents=True)
        assert texts() == TEXTS
        assert not list(root.glob(".preparing-*"))


def test_leftovers_of_a_living_process_are_kept(root):
    """A process that prepares another set holds the lock; this set is whole and does not wait."""
    assert texts() == TEXTS
    (root / ".preparing-other").mkdir()
    with (root / prepare.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert texts() == TEXTS
    assert (root / ".preparing-other").exists()
    assert texts() == TEXTS
    assert not (root / ".preparing-other").exists()


def test_file_system_without_locks_prepares_too(root, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert texts() == TEXTS


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("dataset_info.json", "emptied"),
        ("dataset_info.json", "halved"),
        ("features.json", "deleted"),
        (MANIFEST, "halved"),
        (MANIFEST, "deleted"),
        ("records", "bit"),
        ("records", "deleted"),
    ],
)
def test_damaged_set_is_prepared_again(root, name, damage):
    assert texts() == TEXTS
    place = root / "small" / "1.0.0"
    file = next(place.glob("*array_record*")) if name == "records" else place / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"emptied": b"", "halved": content[: len(content) // 2], "bit": content}[damage])
    assert texts() == TEXTS
    assert prepare._is_whole(place)


def test_set_of_an_earlier_version_is_kept(root):
    assert texts() == TEXTS
    place = root / "small" / "1.0.0"
    (place / MANIFEST).unlink()
    assert texts() == TEXTS
    assert not (place / MANIFEST).exists()
    (place / "dataset_info.json").write_bytes(b"")
    assert texts() == TEXTS
    assert json.loads((place / MANIFEST).read_text()).keys() >= {"dataset_info.json", "features.json"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write\nNo space left on device")],
)
def test_full_disk_is_one_line_and_the_next_run_prepares(root, monkeypatch, refuses, error):
    monkeypatch.setattr(Small, "fail", error)
    with refuses("No space left on device", "ATTNLAB_DATA_DIR"):
        prepared(Small)
    assert not list(root.glob(".preparing-*"))
    monkeypatch.setattr(Small, "fail", None)
    assert texts() == TEXTS


def test_interrupt_leaves_nothing(root, monkeypatch):
    monkeypatch.setattr(Small, "fail", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepared(Small)
    assert not list(root.glob(".preparing-*"))
    shutil.rmtree(root)
