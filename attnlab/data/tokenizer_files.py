"""Read the files of a tokenizer, which may come from a stranger."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from etils import epath

from attnlab import untrusted
from attnlab.errors import InputError, shorten
from attnlab.untrusted import BOOLEAN, NULL, Expected, list_of, mapping_of, string

CONFIG_FILE = "tokenizer_config.json"
MAX_VOCABULARY = 1 << 22  # ids; the largest published vocabularies have 1 million
MAX_GROWTH = 10_000  # times that normalizers may multiply the length of a text

_TEXT = string(1 << 20)
_OBJECT = Expected(
    'an object with a string "content"', lambda x: isinstance(x, Mapping) and _TEXT.accepts(x.get("content"))
)
_TOKEN = _TEXT | _OBJECT
_TEMPLATES = list_of(
    Expected(
        'an object with strings "name" and "template"',
        lambda x: isinstance(x, Mapping) and all(_TEXT.accepts(x.get(key)) for key in ("name", "template")),
    )
)
EXPECTED: dict[str, Expected] = {
    "tokenizer_class": string() | NULL,
    "additional_special_tokens": list_of(_TOKEN) | NULL,
    "extra_special_tokens": list_of(_TOKEN) | mapping_of(_TOKEN) | NULL,
    "added_tokens_decoder": mapping_of(_TOKEN) | NULL,
    "chat_template": _TEXT | _TEMPLATES | NULL,
    "extra_ids": untrusted.integer(0, 10_000) | NULL,
    **dict.fromkeys(
        (
            *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "separate_vocabs"),
            *("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
        ),
        BOOLEAN | NULL,
    ),
}
_OTHER_TOKEN = _TOKEN | BOOLEAN | NULL


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Check the fields of a `tokenizer_config.json`.

    Args:
      settings: the fields.
      where: the file name for error messages.

    Raises:
      InputError: a field has the wrong type, or a token has an id that is not allowed.
    """
    for name, value in settings.items():
        if expected := EXPECTED.get(name, _OTHER_TOKEN if name.endswith("_token") else None):
            untrusted.check(f"{where}: {name}", value, expected)
    for number in settings.get("added_tokens_decoder") or ():
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= MAX_VOCABULARY:
            shown = shorten(repr(number))
            raise InputError(
                f"{where}: added_tokens_decoder has the id {shown}; "
                f"it must be from 0 to {MAX_VOCABULARY - 1:,}"
            )


def read_settings(file: epath.Path) -> dict[str, Any]:
    """Return the checked fields of a `tokenizer_config.json`.

    Raises:
      InputError: see `untrusted.read_object` and `check_settings`.
    """
    settings = untrusted.read_object(file)
    check_settings(settings, str(file))
    return settings


def read_vocabulary(file: epath.Path) -> dict[str, int]:
    """Return the ids of the tokens in a `vocab.json` or `added_tokens.json`.

    Raises:
      InputError: the file is not an object of ids below `MAX_VOCABULARY`.
    """
    vocabulary = untrusted.read_object(file, untrusted.TEXT_BYTES)
    id_type = untrusted.integer(0, MAX_VOCABULARY - 1)
    for token, number in vocabulary.items():
        untrusted.check(f"{file}: the id of {shorten(repr(token))}", number, id_type)
    return vocabulary


def read_backend(file: epath.Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a `tokenizer.json`.

    Raises:
      InputError: the file cannot be read, or its normalizers could turn a short text into one that
        fills the memory.
    """
    text = untrusted.read_text(file)
    with untrusted.one_line_errors(f"{file} cannot be read as a tokenizer"):
        with _without_panic_messages():
            backend = tokenizers.Tokenizer.from_str(text)
        for part in (backend.normalizer, backend.decoder):
            if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
                raise InputError(f"{file}: its replacements can make a text {MAX_GROWTH:,} times longer")
    return backend


@contextlib.contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Discard stderr, where a panic of the Rust library prints a stack before it is raised."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _growth(step: Mapping[str, Any]) -> float:
    """Return an upper bound of the factor by which a normalizer or a decoder lengthens a text."""
    growth = 1.0
    for part in (*(step.get("normalizers") or ()), *(step.get("decoders") or ())):
        growth *= _growth(part)
    if step.get("type") == "Replace":
        growth *= 1 + len(step.get("content") or "")
    if step.get("type") == "Prepend":  # before the whole text
        growth *= 1 + len(step.get("prepend") or "") / 100
    return growth


def check_ids(vocabulary: Mapping[str, int]) -> None:
    """Check that no token has an id that would need a table of more than `MAX_VOCABULARY` rows.

    Raises:
      InputError: names the token.
    """
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(token, 0) >= MAX_VOCABULARY:
        raise InputError(
            f"the token {shorten(repr(token))} has the id {vocabulary[token]}; "
            f"the highest allowed is {MAX_VOCABULARY - 1:,}"
        )
