import os
import socket
from pathlib import Path

import pytest

from attnlab.data import Bytes, Text, text_files
from attnlab.errors import InputError


def text(name):
    return Text(name=name, tokenizer=Bytes(), sequence_length=64)


def joined(data, split):
    return "".join(record["text"] for record in data.records(split))


@pytest.mark.parametrize("name", ["", "stdlib", "tfds:", "text:", "lm1b", "wiki:en"])
def test_unknown_names_are_rejected(name):
    with pytest.raises(InputError, match="stdlib_docs, stdlib_code, tfds:"):
        Text(name=name)


def test_few_files_validate_on_last_tenth(tmp_path):
    contents = ["".join(f"line {i} of {n}: é\r\n" for i in range(400)) for n in range(3)]
    for n, content in enumerate(contents):
        (tmp_path / f"{n}.txt").write_bytes(content.encode())
    data = text(f"text:{tmp_path}/*.txt")
    train, validation = joined(data, "train"), joined(data, "validation")
    assert 0.08 < len(validation) / len(train + validation) < 0.11
    assert validation.startswith("line 3")
    assert sorted((train + validation).splitlines()) == sorted("".join(contents).splitlines())
    batches = data.eval_batches("validation", data.build_tokenizer())
    assert sum(batch.num_bytes.sum() for batch in batches) == len(validation.encode())


def test_many_files_are_split_by_file(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for n in range(20):
            (tmp_path / folder / ("deep" if n % 2 else "") / f"{n}.txt").write_text(f"file {n}\n")
    splits = {p: joined(text(f"text:{tmp_path}/{p}/**/*.txt"), "validation") for p in ("a", "b")}
    assert splits["a"] == splits["b"] != ""
    assert len(splits["a"].splitlines()) == 2
    assert not set(splits["a"].splitlines()) & set(
        joined(text(f"text:{tmp_path}/a/**/*.txt"), "train").splitlines()
    )


@pytest.mark.parametrize("line", ["a line of text é🙂\n", "é🙂"], ids=["lines", "one line"])
def test_long_files_are_split_into_documents(tmp_path, line):
    content = line * (5 * text_files.DOCUMENT_BYTES // len(line.encode()))
    (tmp_path / "long.txt").write_text(content)
    records = text(f"text:{tmp_path}/long.txt").records("train")
    assert len(records) >= 4
    assert max(len(record["text"].encode()) for record in records) <= 1.3 * text_files.DOCUMENT_BYTES
    rest = joined(text(f"text:{tmp_path}/long.txt"), "validation")
    assert "".join(record["text"] for record in records) + rest == content


def test_relative_glob_is_stored_as_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text("text:./some/*.txt").name == f"text:{tmp_path}/some/*.txt"
    assert text(f"text:{tmp_path}/*.txt").name == f"text:{tmp_path}/*.txt"
    assert text("tfds:some/config").name == "tfds:some/config"


def test_relative_and_home_globs_are_resolved(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert joined(text("text:*.txt"), "train") == joined(text("text:~/a.txt"), "train")


def error_message(tmp_path, name, content=None):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        text(f"text:{path}").records("validation")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_contain_file_name(tmp_path):
    assert "matches no file" in error_message(tmp_path, "nothing-*.txt")
    assert "empty.txt is empty" in error_message(tmp_path, "empty.txt", b" \n")
    assert "bad.txt is not UTF-8 text, see byte 3" in error_message(tmp_path, "bad.txt", b"abc\xff")
    assert "too little text" in error_message(tmp_path, "tiny.txt", b"hello")
    assert f"text:{tmp_path}/*.txt" in error_message(tmp_path, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_is_reported(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    assert "cannot read" in error_message(tmp_path, "secret.txt")


def test_missing_file_is_reported(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    assert "link.txt" in error_message(tmp_path, "link.txt")


@pytest.mark.parametrize("kind", ["fifo", "zero", "kmsg", "folder", "socket", "loop"])
def test_other_than_regular_files_are_refused_without_reading(tmp_path, kind):
    path = tmp_path / "x.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = Path({"zero": "/dev/zero", "kmsg": "/proc/kmsg"}[kind])
    messages = {
        "fifo": "is a FIFO",
        "zero": "is a device",
        "kmsg": "kmsg",
        "folder": "is a directory",
        "socket": "is a socket",
        "loop": "Too many levels",
    }
    with pytest.raises(InputError, match=messages[kind]) as caught:
        text(f"text:{path}").records("train")
    assert "\n" not in str(caught.value)


def test_symlinks_to_folders_above_are_refused(tmp_path):
    """`glob` would visit all 2^40 paths that two such links give."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a line\n" * 50)
    for name in ("one", "two"):
        (tmp_path / "deep" / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match="the symlink .*/deep/(one|two) leads to a folder above it"):
        text(f"text:{tmp_path}/**/*.txt").records("train")


def test_symlink_to_another_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a line\n" * 50)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    assert joined(text(f"text:{tmp_path}/data/**/*.txt"), "train").startswith("a line")


@pytest.mark.parametrize("count", [1, 12])
def test_file_names_that_are_not_utf8(tmp_path, count):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("a line\n" * 50)
    for n in range(count - 1):
        (tmp_path / f"{n}.txt").write_text("a line\n" * 50)
    data = text(f"text:{tmp_path}/*.txt")
    assert name in data.files()
    assert joined(data, "train") + joined(data, "validation") == "a line\n" * 50 * count


@pytest.mark.parametrize("count", [1, 10])
def test_byte_order_mark_is_dropped(tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n}.txt").write_bytes(b"\xef\xbb\xbf" + b"the cat \xef\xbb\xbf sat\n" * 30)
    data = text(f"text:{tmp_path}/*.txt")
    whole = joined(data, "train") + joined(data, "validation")
    assert whole == "the cat \ufeff sat\n" * 30 * count  # only the mark at the start is one
    (tmp_path / "0.txt").write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(InputError, match=r"0\.txt is empty"):
        data.records("train")


def test_name_with_a_nul_character_is_refused(tmp_path):
    with pytest.raises(InputError, match="matches no file"):
        text("text:a\0b").records("train")
