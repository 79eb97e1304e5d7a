"""Fingerprints: every change of the data is named, and nothing else changes them."""

import hashlib
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from attnlab.data import Bytes, Text, fingerprint
from tests.data.toys import Documents, Images, LastWord, Sounds

BYTES = Bytes().train([])


def of(data, tokenizer=BYTES):
    return fingerprint.fingerprint(data, tokenizer)


def changes(old, new):
    text = fingerprint.changes(old, new)
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three text files."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} line\n" * 100)
    return tmp_path


def text(pattern):
    return Text(name=f"text:{pattern}", tokenizer=Bytes())


def flip(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: flip(folder / "b.txt"), "'b.txt' has changed"),
        (lambda folder: (folder / "d.txt").write_text("d\n" * 50), "'d.txt' was added"),
        (lambda folder: (folder / "c.txt").unlink(), "'c.txt' was removed"),
        (
            lambda folder: (folder / "c.txt").rename(folder / "d.txt"),
            "'c.txt' was removed; 'd.txt' was added",
        ),
        (lambda folder: (folder / "a.txt").write_text("a line\n" * 101), "'a.txt' has changed (700 -> 707)"),
        (lambda folder: (folder / "a.txt").write_text("a line\n" * 99), "'a.txt' has changed (700 -> 693)"),
        (lambda folder: os.utime(folder / "a.txt", (0, 0)), ""),
        (lambda folder: (folder / "other").write_text("not matched"), ""),
    ],
    ids=["byte", "added", "removed", "renamed", "grown", "shrunk", "touched", "other file"],
)
def test_changes_of_text_files_are_named(folder, change, message):
    data = text(f"{folder}/*.txt")
    before = of(data)
    change(folder)
    assert changes(before, of(data)) == message


def test_full_hash_is_that_of_the_file(folder):
    entry = of(text(f"{folder}/a.txt"))["content"]["a.txt"]
    assert entry == f"700 {hashlib.sha256((folder / 'a.txt').read_bytes()).hexdigest()}"


def test_moved_folder_has_the_same_fingerprint(folder, tmp_path):
    before = of(text(f"{folder}/*.txt"))
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert of(text(f"{moved}/*.txt")) == before


def test_large_files_are_sampled(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 2)
    full_file = text(f"{folder}/a.txt")
    assert of(full_file)["coverage"] == "full"
    data = text(f"{folder}/*.txt")
    before = of(data)
    assert before["coverage"] == "sampled"
    first, last = bytearray((folder / "a.txt").read_bytes()), bytearray((folder / "b.txt").read_bytes())
    first[0] ^= 1
    last[-2] ^= 1
    (folder / "a.txt").write_bytes(first)
    (folder / "b.txt").write_bytes(last)
    (folder / "c.txt").write_text("c line\n" * 101)
    assert changes(before, of(data)).count("has changed") == 3
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 10**6)
    assert changes(before, of(data)) == "'c.txt' has changed (700 -> 707)"  # only sizes are comparable


@dataclass(frozen=True, kw_only=True)
class Folder(Documents):
    """Records of one folder of files of any kind, such as images with captions."""

    path_fields = ("folder",)
    folder: str = ""


def test_files_of_path_fields_are_hashed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "captions.txt").write_text("a cat")
    Image.new("L", (4, 4)).save(tmp_path / "deep" / "cat.png")
    data = Folder(folder=str(tmp_path), documents=("a cat",))
    before = of(data)
    Image.new("L", (4, 4), color=1).save(tmp_path / "deep" / "cat.png")
    (tmp_path / "captions.txt").write_text("a dog")
    assert changes(before, of(data)).count("has changed") == 2
    assert "deep/cat.png' has changed" in changes(before, of(data))
    one = Folder(folder=str(tmp_path / "captions.txt"), documents=("a cat",))
    assert list(of(one)["content"]) == ["captions.txt"]


class Pair(NamedTuple):
    """A record of a caption and an array."""

    text: str
    pixels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Given(Documents):
    """Given records."""

    given: tuple = ()

    def records(self, split):
        return list(self.given)

    def text(self, record):
        return "a"


ZERO, ONE = np.zeros(3, np.float32), np.array([0, 0, 1e-7], np.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ab", "ac"),
        (b"ab", "ab"),
        (1, 1.0),
        (("a", "bc"), ("ab", "c")),
        (("a", ("b",)), ("a", "b")),
        ({"a": 1}, {"a": 2}),
        (Pair("a", ZERO), Pair("a", ONE)),
        (ZERO, ZERO.astype(np.float64)),
        (ZERO, ZERO[None]),
        (np.array([None, "a"], object), np.array([None, "b"], object)),
        (LastWord(count=1), LastWord(count=2)),
        (Image.new("L", (2, 3)), Image.new("L", (3, 2))),
        ("caf\udce9", "caf\udce8"),
        (frozenset({1}), frozenset({2})),
    ],
)
def test_records_that_differ_have_different_fingerprints(one, other):
    first, second = (of(Given(given=(record,))) for record in (one, other))
    assert changes(first, second) == "'train' has changed; 'validation' has changed"
    assert changes(first, of(Given(given=(one,)))) == ""


def test_record_that_is_a_path_includes_its_file(tmp_path):
    (tmp_path / "sound.wav").write_bytes(b"one")
    data = Given(given=(tmp_path / "sound.wav",))
    before = of(data)
    (tmp_path / "sound.wav").write_bytes(b"two")
    assert changes(before, of(data)) != ""


def test_number_of_records_is_named():
    before = of(Documents(documents=("one", "two")))
    assert "'train' has changed (2 -> 3)" in changes(before, of(Documents(documents=("one", "two", "three"))))


@pytest.mark.parametrize("data", [Images(), Sounds(), LastWord()], ids=lambda data: type(data).__name__)
def test_fingerprint_is_the_same_at_each_call(data):
    tokenizer = data.build_tokenizer()
    assert of(data, tokenizer) == of(data, tokenizer)


def test_many_records_are_sampled(monkeypatch):
    data = Documents(documents=tuple(map(str, range(100))))
    full = of(data)
    monkeypatch.setattr(fingerprint, "SAMPLED_RECORDS", 4)
    for name, limit in (("FULL_RECORDS", 99), ("FULL_BYTES", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, name, limit)
            sampled = of(data)
            assert (full["coverage"], sampled["coverage"]) == ("full", "sampled")
            changed = of(replace(data, documents=(*data.documents[:-1], "last")))
            assert "'train' has changed" in changes(sampled, changed)


def test_changed_preparation_is_named(folder, monkeypatch):
    data = text(f"{folder}/*.txt")
    before = of(data)
    monkeypatch.setattr("attnlab.data.text_files.VALIDATION_SHARE", 5)
    assert "examples of train are prepared differently" in changes(before, of(data))
