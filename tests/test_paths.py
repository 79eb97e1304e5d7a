"""Folders with numbered entries, and removal and moves of files, links and folders."""

import os

import pytest
from etils import epath

from attnlab.paths import move_folder, numbered_entries, remove


def test_numbered_entries_are_ascii_decimals_without_leading_zeros(tmp_path):
    numbers = [0, 7, 10, 9, 10**200]
    others = ["07", "\u00b2", "\u0663", "+1", "-1", "1.0", "1e3", " 1", "1\n", "7.tmp", os.fsdecode(b"\xff")]
    for name in (*map(str, numbers), *others):
        (tmp_path / name).touch()
    assert numbered_entries(epath.Path(tmp_path)) == sorted(numbers)
    assert numbered_entries(epath.Path(tmp_path / "nowhere")) == []


def test_numbered_entries_of_a_file_are_an_error_of_one_line(tmp_path, refuses):
    (tmp_path / "file").touch()
    with refuses(f"{tmp_path}/file cannot be read: Not a directory"):
        numbered_entries(epath.Path(tmp_path / "file"))


@pytest.mark.parametrize("act", ["remove", "move"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken link"])
def test_remove_and_move_take_the_entry_and_not_the_target_of_a_link(tmp_path, act, kind):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    entry = tmp_path / "entry"
    if kind == "file":
        entry.touch()
    elif kind == "folder":
        (entry / "deep").mkdir(parents=True)
    else:
        entry.symlink_to("target" if kind == "link" else "nowhere")
    if act == "remove":
        remove(epath.Path(entry))
        remove(epath.Path(entry))  # it does not exist any more
    else:
        move_folder(epath.Path(entry), epath.Path(tmp_path / "moved"))
        assert os.path.lexists(tmp_path / "moved")
    assert not os.path.lexists(entry)
    assert (tmp_path / "target" / "kept").exists()
