"""Exceptions and texts as one line."""

import pytest

from attnlab.errors import InputError, one_line, shorten


class Silent(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a\n  b"), "ValueError: a b"),
        (InputError("a\nb"), "a b"),
        (InputError(), "InputError"),
        (KeyError(), "KeyError"),
        (Silent(), "Silent"),
        (OSError("x" * 300), f"OSError: {'x' * 197}..."),
    ],
)
def test_exception_is_one_line(error, expected):
    assert one_line(error) == expected


def test_types_may_be_left_out():
    assert one_line(KeyError("x"), unnamed=Exception) == "'x'"
    assert one_line(KeyError("x"), unnamed=ValueError) == "KeyError: 'x'"


def test_short_texts_stay():
    assert shorten("x" * 60) == "x" * 60
    assert shorten("x" * 61) == "x" * 57 + "..."
