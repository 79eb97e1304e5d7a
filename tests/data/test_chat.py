"""Chats by a template, and tokenizers that were made elsewhere."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from attnlab.data import BPE, Text, Tokenizer
from attnlab.data.chat import render

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": " the cat "}]


@pytest.fixture
def foreign():
    """A tokenizer of words that begins texts with a token of its own."""
    words = ["[CLS]", "[SEP]", "<user>", "<assistant>", "the", "cat"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: 2 * i for i, w in enumerate(words)}, unk_token="cat"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:4])
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    return Tokenizer(
        backend,
        {
            "sep_token": "[SEP]",
            "bos_token": {"content": "[CLS]"},
            "eos_token": "[SEP]",
            "chat_template": TEMPLATE,
        },
    )


def test_a_prompt_begins_as_its_tokenizer_has_it(foreign):
    assert foreign.encode_prompt("the cat") == [0, 8, 10]
    assert foreign.encode("the cat").tolist() == [8, 10]
    assert (foreign.eos_id, foreign.vocab_size) == (2, 11)  # numbers have gaps
    assert (foreign.bos_tokens, foreign.encode_document("the cat")) == ([0], [0, 8, 10])
    own = BPE(300).train(["the cat"])
    assert (
        own.mask_id == own.eos_id
        and Tokenizer(foreign._backend, {"eos_token": "[SEP]", "mask_token": "[CLS]"}).mask_id == 0
    )
    assert own.encode_document("the cat") == [*own.encode_prompt("the cat"), own.eos_id]
    assert own.encode_prompt("the cat") == [own.eos_id, *own.encode("the cat")]


def test_what_is_trained_on_begins_as_a_prompt_and_ends(foreign):
    end = processors.TemplateProcessing(
        single="[CLS] <user> $A [SEP]", special_tokens=[("[CLS]", 0), ("<user>", 4), ("[SEP]", 2)]
    )
    foreign._backend.post_processor = end
    example = Text().encode({"text": "the cat"}, foreign)
    assert foreign.encode_prompt("the cat") == [*example.tokens] == [0, 4, 8, 10]
    assert foreign.encode_document("the cat") == [*example.tokens, 2]
    assert ([*example.targets], [*example.weights]) == ([4, 8, 10, 2], [0, 1, 1, 1])
    prefixed = foreign.with_prefix_tokens(99, 4)  # which need be none of its own
    other = Text().encode({"text": "the cat"}, prefixed)
    assert ([*other.tokens], [*other.weights]) == ([99, 4, 8, 10], [0, 1, 1, 1])
    assert other.num_bytes.tolist() == example.num_bytes.tolist()
    foreign._backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    del foreign.bos_tokens, foreign.prefix_tokens
    assert foreign.encode_prompt("the cat") == [8, 10] and [
        *Text().encode({"text": "the cat"}, foreign).tokens
    ] == [
        2,
        8,
        10,
    ]


def test_a_chat_is_its_template_with_special_tokens_as_tokens(foreign):
    assert (
        render(TEMPLATE, messages=ASKED, bos_token="^", eos_token="$", add_generation_prompt=True)
        == "^<user>the cat$\n<assistant>"
    )
    assert foreign.encode_chat(ASKED) == [0, 4, 8, 10, 2, 6]


def test_saved_and_loaded_it_is_the_same(foreign, tmp_path):
    foreign.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.settings == foreign.settings
    assert again.encode_chat(ASKED) == foreign.encode_chat(ASKED)
    assert again.token_bytes.tolist() == foreign.token_bytes.tolist()


def test_what_cannot_be_chatted(foreign, refuses):
    with refuses("no chat template"):
        BPE(300).train(["a"]).encode_chat(ASKED)
    with refuses("refuses this chat: only users"):
        render("{{ raise_exception('only users') }}")
    with refuses("cannot be used"):
        render("{% for %}")
    with refuses("has no eos_token"):
        Tokenizer(foreign._backend, {"eos_token": "</s>"})


def test_a_template_reads_no_files():
    with pytest.raises(Exception, match="unsafe|cannot be used"):
        render("{{ messages.__class__.__mro__ }}", messages=[])


def test_bytes_of_word_pieces():
    pieces = {"[UNK]": 0, "the": 1, "##re": 2, "[SEP]": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    assert Tokenizer(backend, json.loads('{"sep_token": "[SEP]"}')).token_bytes.tolist() == [0, 4, 2, 0]
