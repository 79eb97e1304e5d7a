"""Text that grows token by token: what is certain is returned, and stop strings end it."""

import pytest

from attnlab.data import Bytes
from attnlab.generation import printable
from attnlab.generation.completion import GenerationInput, IncrementalDetokenizer

TOKENIZER = Bytes().train([])


def rows_of(text, stop=(), piece=1):
    """A row fed with these bytes, a few at a time; what it gave, piece by piece."""
    row, given = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, stop), []
    ids = TOKENIZER.encode(text).tolist() if isinstance(text, str) else list(text)
    for start in range(0, len(ids), piece):
        given.append(row.add(ids[start : start + piece]))
    given.append(row.end("length"))
    return row.completion(), given


@pytest.mark.parametrize("piece", [1, 3, 16])
@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one. two", ["."], "one"),
        ("one END two", ["END", "two"], "one "),
        ("one EN END", ["END"], "one EN "),
        ("no stop EN", ["END"], "no stop EN"),
        ("abé€é abé", ["bé€x", "abé€é a"], ""),
        ("xbé", ["bé"], "x"),
        ("tail \N{SNOWMAN}", [], "tail \N{SNOWMAN}"),
    ],
)
def test_what_is_streamed_is_the_text(text, stop, expected, piece):
    done, given = rows_of(text, stop, piece)
    assert done.text == expected == "".join(given)
    assert done.finish_reason == ("stop" if expected != text else "length")
    for i in range(len(given)):
        assert expected.startswith("".join(given[:i]))


@pytest.mark.parametrize("piece", [1, 2, 5])
def test_the_token_that_completes_a_stop_string_is_the_last(piece):
    done, _ = rows_of("one, two, three", [", t"], piece)
    assert TOKENIZER.decode(done.tokens) == "one, t" and done.text == "one"


def test_half_a_character_waits_for_its_other_half():
    _, given = rows_of("a€b")
    ids = TOKENIZER.encode("a€b")
    assert len(ids) == 5
    assert given == ["a", "", "", "€", "b", ""]
    _, given = rows_of("a€")
    assert given[:-1] == ["a", "", "", "€"]


def test_a_broken_end_is_given_once_nothing_can_mend_it():
    ids = TOKENIZER.encode("a€").tolist()[:-1]
    row = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, ())
    assert row.add(ids) == "a"
    assert row.end("length") == row.completion().text[1:] == "\N{REPLACEMENT CHARACTER}"


def test_nothing_comes_after_the_end():
    row = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, ["z"])
    ids = TOKENIZER.encode("ab").tolist()
    assert row.add([*ids, TOKENIZER.eos_id, *ids]) == "ab"
    assert row.add(ids) == "" and row.end("length") == ""
    assert row.completion().tokens == ids and row.completion().finish_reason == "eos"


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\x00\x7f\x9b b\n\tc") == "a␛[2J␀␡\ufffd b\n\tc"
