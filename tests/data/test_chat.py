"""Chat templates and imported tokenizers."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from attnlab.data import BPE, Text, Tokenizer, chat
from attnlab.data.chat import render

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": " the cat "}]


@pytest.fixture
def imported():
    """A word tokenizer that prepends its own special token to texts."""
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


def test_prompt_has_prefix_of_tokenizer(imported):
    assert imported.encode_prompt("the cat") == [0, 8, 10]
    assert imported.encode("the cat").tolist() == [8, 10]
    assert (imported.eos_id, imported.vocab_size) == (2, 11)  # token ids have gaps
    assert (imported.bos_tokens, imported.encode_document("the cat")) == ([0], [0, 8, 10])
    trained = BPE(300).train(["the cat"])
    assert (
        trained.mask_id == trained.eos_id
        and Tokenizer(imported._backend, {"eos_token": "[SEP]", "mask_token": "[CLS]"}).mask_id == 0
    )
    assert trained.encode_document("the cat") == [*trained.encode_prompt("the cat"), trained.eos_id]
    assert trained.encode_prompt("the cat") == [trained.eos_id, *trained.encode("the cat")]


def test_training_examples_have_prompt_prefix_and_end(imported):
    end = processors.TemplateProcessing(
        single="[CLS] <user> $A [SEP]", special_tokens=[("[CLS]", 0), ("<user>", 4), ("[SEP]", 2)]
    )
    imported._backend.post_processor = end
    example = Text().encode({"text": "the cat"}, imported)
    assert imported.encode_prompt("the cat") == [*example.tokens] == [0, 4, 8, 10]
    assert imported.encode_document("the cat") == [*example.tokens, 2]
    assert ([*example.targets], [*example.weights]) == ([4, 8, 10, 2], [0, 1, 1, 1])
    prefixed = imported.with_prefix_tokens(99, 4)  # the ids need not be in the vocabulary
    other = Text().encode({"text": "the cat"}, prefixed)
    assert ([*other.tokens], [*other.weights]) == ([99, 4, 8, 10], [0, 1, 1, 1])
    assert other.num_bytes.tolist() == example.num_bytes.tolist()
    imported._backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    del imported.bos_tokens, imported.prefix_tokens
    assert imported.encode_prompt("the cat") == [8, 10] and [
        *Text().encode({"text": "the cat"}, imported).tokens
    ] == [
        2,
        8,
        10,
    ]


def test_chat_template_encodes_special_tokens(imported):
    assert (
        render(TEMPLATE, messages=MESSAGES, bos_token="^", eos_token="$", add_generation_prompt=True)
        == "^<user>the cat$\n<assistant>"
    )
    assert imported.encode_chat(MESSAGES) == [0, 4, 8, 10, 2, 6]


def test_save_load_roundtrip(imported, tmp_path):
    imported.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.settings == imported.settings
    assert loaded.encode_chat(MESSAGES) == imported.encode_chat(MESSAGES)
    assert loaded.token_bytes.tolist() == imported.token_bytes.tolist()


def test_invalid_chats_are_rejected(imported, refuses):
    with refuses("no chat template"):
        BPE(300).train(["a"]).encode_chat(MESSAGES)
    with refuses("refuses this chat: only users"):
        render("{{ raise_exception('only users') }}")
    with refuses("cannot be used"):
        render("{% for %}")
    with refuses("has no eos_token"):
        Tokenizer(imported._backend, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 10**(10**9) }}",
    ],
)
def test_templates_without_end_are_stopped(template, refuses):
    with refuses("it needs more than"):
        render(template)
    assert render("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "MiB of memory"),
        ("{{ ('a'*10**6).center(10**10) }}", "MiB of memory"),
        ("{{ '%2000000000d' % 1 }}", "MiB of memory"),
        ("{{ messages|tojson(indent=10**9) }}", "MiB of memory"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "memory",
        ),
        (
            "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "memory",
        ),
        ("{{ 'a' * (17 * 1024 * 1024) }}", "characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself"),
        ("{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}", "calls itself"),
        ("{{ raise_exception('one\ntwo') }}", "refuses this chat: one two"),
        (r"{{ '\ud800' }}", "not Unicode"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ undefined.field }}", "undefined"),
        ("{% include 'x' %}", "cannot be used"),
        ("{{ (" + "(" * 500 + "1" + ")" * 500 + ") }}", "cannot be used"),
    ],
)
def test_templates_are_limited(template, message, refuses):
    with refuses(message):
        render(template, messages=MESSAGES)


def test_worker_renders_again_after_it_was_killed():
    assert render("{{ x }}", x="\u00e4\n") == "\u00e4\n"
    chat._WORKER._process.kill()
    chat._WORKER._process.wait()
    assert render("{{ x }}", x=[1]) == "[1]"


def test_worker_does_not_import_jax_nor_run_startup_files():
    render("")
    process = Path(f"/proc/{chat._WORKER._process.pid}")
    assert (process / "cmdline").read_bytes().split(b"\0")[1:3] == [b"-I", b"-S"]
    mapped = (process / "maps").read_text()
    assert "jax" not in mapped and "numpy" not in mapped


def test_chat_that_is_not_json_is_rejected(refuses):
    with refuses("cannot be written as JSON"):
        render("{{ x }}", x=object())


def test_template_cannot_access_attributes():
    with pytest.raises(Exception, match="unsafe|cannot be used"):
        render("{{ messages.__class__.__mro__ }}", messages=[])


def test_token_bytes_of_word_pieces():
    pieces = {"[UNK]": 0, "the": 1, "##re": 2, "[SEP]": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    assert Tokenizer(backend, json.loads('{"sep_token": "[SEP]"}')).token_bytes.tolist() == [0, 4, 2, 0]
