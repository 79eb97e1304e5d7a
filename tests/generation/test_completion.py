"""Incremental detokenization: streamed text, incomplete characters and stop strings."""

import pytest

from attnlab.data import Bytes
from attnlab.generation import printable
from attnlab.generation.completion import GenerationInput, IncrementalDetokenizer

TOKENIZER = Bytes().train([])


def detokenize(text, stop=(), piece=1):
    """Detokenize a text `piece` tokens at a time; return the completion and the streamed pieces."""
    row, pieces = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, stop, [TOKENIZER.eos_id]), []
    ids = TOKENIZER.encode(text).tolist() if isinstance(text, str) else list(text)
    for start in range(0, len(ids), piece):
        pieces.append(row.add(ids[start : start + piece]))
    pieces.append(row.end("length"))
    return row.completion(), pieces


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
def test_streamed_pieces_concatenate_to_text(text, stop, expected, piece):
    completion, pieces = detokenize(text, stop, piece)
    assert completion.text == expected == "".join(pieces)
    assert completion.finish_reason == ("stop" if expected != text else "length")
    for i in range(len(pieces)):
        assert expected.startswith("".join(pieces[:i]))


@pytest.mark.parametrize("piece", [1, 2, 5])
def test_completing_token_of_stop_string_is_last(piece):
    completion, _ = detokenize("one, two, three", [", t"], piece)
    assert TOKENIZER.decode(completion.tokens) == "one, t" and completion.text == "one"


def test_incomplete_characters_are_withheld():
    _, pieces = detokenize("a€b")
    ids = TOKENIZER.encode("a€b")
    assert len(ids) == 5
    assert pieces == ["a", "", "", "€", "b", ""]
    _, pieces = detokenize("a€")
    assert pieces[:-1] == ["a", "", "", "€"]


def test_incomplete_character_at_end_is_replaced():
    ids = TOKENIZER.encode("a€").tolist()[:-1]
    row = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, (), [TOKENIZER.eos_id])
    assert row.add(ids) == "a"
    assert row.end("length") == row.completion().text[1:] == "\N{REPLACEMENT CHARACTER}"


def test_tokens_after_eos_are_ignored():
    row = IncrementalDetokenizer(GenerationInput("", []), TOKENIZER, ["z"], [TOKENIZER.eos_id])
    ids = TOKENIZER.encode("ab").tolist()
    assert row.add([*ids, TOKENIZER.eos_id, *ids]) == "ab"
    assert row.add(ids) == "" and row.end("length") == ""
    assert row.completion().tokens == ids and row.completion().finish_reason == "eos"


def test_printable_escapes_control_characters():
    assert printable("a\x1b[2J\x00\x7f\x9b b\n\tc") == "a␛[2J␀␡\ufffd b\n\tc"
