import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data import BPE, Bytes, Tokenizer, Words
from attnlab.errors import InputError

TEXTS = ["def f(x):\n    return x  # naïve 🙂\n" * 20, "the cat sat on the mat, the cat slept " * 20]
BYTEWISE = {"bytes": Bytes().train([]), "bpe": BPE(vocab_size=280).train(TEXTS)}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<eos>", "a<eos>b", "\r\n\t \x00"]
)


@pytest.mark.parametrize("kind", BYTEWISE)
@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_encode_decode_roundtrip(kind, text):
    tokenizer = BYTEWISE[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_byte_tokenizer_ids_are_bytes():
    tokenizer = BYTEWISE["bytes"]
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_id == 256
    assert list(tokenizer.encode("é a")) == [*"é a".encode()]
    np.testing.assert_array_equal(tokenizer.token_bytes, [1] * 256 + [0])


@pytest.mark.parametrize("tokenizer", [*BYTEWISE.values(), Words().train(["a bb c"])])
def test_save_load_roundtrip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    np.testing.assert_array_equal(loaded.token_bytes, tokenizer.token_bytes)
    np.testing.assert_array_equal(loaded.encode("a bb c"), tokenizer.encode("a bb c"))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_bpe_training_is_deterministic_across_processes(tmp_path):
    # Source code of the standard library, in which many pairs have equal counts.
    program = (
        "import sys, inspect, argparse, typing, json; from attnlab.data import BPE;"
        "texts = [inspect.getsource(m) for m in (argparse, typing, json)];"
        "BPE(vocab_size=2000).train(texts).save(sys.argv[1])"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bpe_learns_frequent_pairs_up_to_vocab_size():
    assert BYTEWISE["bpe"].vocab_size == 280
    assert len(BYTEWISE["bpe"].encode(" the cat")) < 4
    assert BPE(vocab_size=10_000).train(TEXTS).vocab_size < 10_000


def test_bpe_reads_limited_training_text(monkeypatch):
    monkeypatch.setattr("attnlab.data.tokenizer.TRAINING_CHARACTERS", 100)
    endless = iter(lambda: "the cat ", None)
    assert BPE(vocab_size=257).train(endless).vocab_size == 257


def test_word_tokenizer():
    tokenizer = Words().train(["the cat sat", "the dog"])
    assert tokenizer.vocab_size == 5
    assert tokenizer.decode(tokenizer.encode("the  dog\nsat")) == "the dog sat"
    assert tokenizer.token_bytes[tokenizer.encode("the dog")].sum() == len("the dog ")
    with pytest.raises(InputError, match="'mouse'"):
        tokenizer.encode("the mouse sat")
    with pytest.raises(InputError, match="reserved"):
        Words().train(["a <eos>"])


def test_token_text_escapes_partial_characters():
    tokenizer = BYTEWISE["bytes"]
    assert [tokenizer.token_text(i) for i in (*b"a\n ", 0xE2, 256)] == ["a", "\n", " ", "\\xe2", "<eos>"]
    assert Words().train(["cat"]).token_text(1) == "cat"


def test_invalid_arguments_are_rejected(tmp_path):
    with pytest.raises(InputError, match="257"):
        BPE(vocab_size=256)
    with pytest.raises(InputError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("tokenizer", [*BYTEWISE.values(), Words().train(["a bb c"])])
@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", "a\udfff b"])
def test_text_that_is_not_unicode_is_refused(tokenizer, text, refuses):
    for encode in (
        tokenizer.encode,
        tokenizer.encode_prompt,
        tokenizer.encode_source,
        tokenizer.encode_document,
        tokenizer.token_id,
    ):
        with refuses("a text must be UTF-8, but its character", "U+D"):
            encode(text)


@pytest.mark.parametrize("kind", [BPE(vocab_size=260), Words()])
def test_training_text_that_is_not_unicode_is_refused(kind, refuses):
    with refuses("its character 1 is U+DC80"):
        kind.train(["fine", "a\udc80"])
