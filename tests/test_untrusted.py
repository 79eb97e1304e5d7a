import json
import os
import socket

import pytest
from etils import epath

from attnlab import untrusted
from attnlab.errors import InputError


def refused(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_read_bytes_refuses_everything_but_regular_files(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("absent")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # the path of a socket has at most 107 characters
    server.bind("socket")
    os.chdir(here)
    for name, word in {
        "folder": "a folder",
        "fifo": "a FIFO",
        "zero": "a device",
        "socket": "a socket",
        "loop": "symbolic links",
        "dangling": "No such file",
        "absent": "No such file",
        "a\0b": "null",
        "x" * 300: "too long",
    }.items():
        assert word in refused(untrusted.read_bytes, tmp_path / name)
        assert word in refused(untrusted.check_regular, tmp_path / name)
    server.close()


def test_read_bytes_follows_symlinks_and_limits_size(tmp_path):
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("blob")
    assert untrusted.read_bytes(tmp_path / "link", 5) == b"12345"
    assert "larger than the 4 bytes" in refused(untrusted.read_bytes, tmp_path / "link", 4)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)  # a terabyte of zeros that takes no room
    assert "larger" in refused(untrusted.read_bytes, tmp_path / "sparse", 1000)


def test_read_text_requires_utf8(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("\ufeffä\r\n\rb\u2028".encode())
    assert untrusted.read_text(file) == file.open().read() == "\ufeffä\n\nb\u2028"
    file.write_bytes(b"abc\xff")
    assert "0xff at position 3" in refused(untrusted.read_text, file)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a/", "a\0", 5, None, ["x"], "x" * 300]
)
def test_inside_refuses_names_that_lead_out(tmp_path, name):
    assert "inside this folder" in refused(untrusted.inside, epath.Path(tmp_path), name)


def test_inside_keeps_ordinary_names(tmp_path):
    folder = epath.Path(tmp_path)
    for name in ("model-00001-of-00002.safetensors", "1_Pooling/config.json", "..a"):
        assert untrusted.inside(folder, name) == folder / name


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested"),
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("9" * 5000, "5,000 digits"),
        ("-" + "9" * 5000, "digits"),
        ("1e999", "too large"),
        ("1." + "1" * 5000, "too large"),
        ("NaN", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' twice"),
        (r'["\ud800"]', "escape"),
        (r'{"\udc00x": 1}', "escape"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
    ],
)  # fmt: skip
def test_parse_json_refuses(text, word):
    assert word in refused(untrusted.parse_json, text, "f.json")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [],
        {},
        "x",
        10**30,
        1e300,
        [[[{}]]],
        {"a": [1, 2.5, "\U0001f600", "\ud7ff\n"], "b": {"a": None}},
    ],
)
def test_parse_json_agrees_with_json(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        assert untrusted.parse_json(text.encode(), "f.json") == value


def test_read_object_requires_an_object(tmp_path):
    file = tmp_path / "f.json"
    for text, kind in {"[]": "a list", "5": "an integer", "null": "null", '"x"': "a string"}.items():
        file.write_text(text)
        assert f"is {kind}; it must be a JSON object" in refused(untrusted.read_object, file)
    file.write_text('{"a": 1}')
    assert untrusted.read_object(file) == {"a": 1}


@pytest.mark.parametrize(
    ("expected", "good", "bad"),
    [
        (untrusted.integer(1, 8), [1, 8], [0, 9, True, 1.0, "1", None, [1], 10**12]),
        (untrusted.number(0, 1), [0, 0.5, 1], [-1, 2, float("nan"), float("inf"), "1", False, None, {}]),
        (untrusted.string(3), ["", "abc"], ["abcd", 1, None, ["a"]]),
        (untrusted.BOOLEAN, [True, False], [0, 1, "true", None]),
        (untrusted.BOOLEAN | untrusted.NULL, [True, None], [0]),
        (
            untrusted.list_of(untrusted.integer(0, 9), 1, 2),
            [[1], [1, 2]],
            [[], [1, 2, 3], ["1"], 1, {"a": 1}, "ab"],
        ),
        (untrusted.mapping_of(untrusted.string()), [{}, {"a": "b"}], [[], {"a": 1}, "x", None]),
    ],
)
def test_fields_are_checked(expected, good, bad):
    for value in good:
        assert untrusted.Fields({"x": value}, "f.json", {"x": expected})["x"] == value
    for value in bad:
        fields = untrusted.Fields({"x": value}, "f.json", {"x": expected})
        message = refused(lambda fields=fields: fields["x"])
        assert message.startswith("f.json: x=") and expected.description in message


def test_fields_that_are_absent():
    fields = untrusted.Fields({"x": None, "y": 10**9}, "f.json", {"x": untrusted.integer(0, 1)})
    assert (fields.get("x", 3), fields.get("absent", 4), fields.get("y"), set(fields), len(fields)) == (
        3,
        4,
        10**9,
        {"x", "y"},
        2,
    )
    assert "lacks 'absent'" in refused(lambda: fields["absent"])
    assert "x=null" in refused(lambda: fields["x"])
