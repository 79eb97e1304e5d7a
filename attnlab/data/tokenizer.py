"""Tokenizers: three trainable kinds, and those of checkpoints, with one interface."""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from attnlab.data.chat import render
from attnlab.data.tokenizer_files import CONFIG_FILE, check_ids, read_backend, read_settings
from attnlab.errors import InputError
from attnlab.untrusted import one_line_errors

EOS = "<eos>"
CANNOT_ENCODE = "this text cannot be tokenized"
SOURCE_TARGET_FILES = ("source.tokenizer.json", "target.tokenizer.json")

# Characters of training text for a BPE: merges converge long before, and memory stays small.
TRAINING_CHARACTERS = 2**25


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level tokenizers use for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class Tokenizer:
    """Text to token ids and back, saved as a `tokenizer.json` of the `tokenizers` library.

    Args:
      backend: the tokenizer of the library.
      settings: the `tokenizer_config.json` of a checkpoint's tokenizer, with its special tokens and
        chat template. None for a tokenizer of this module.
      source_target_tokenizers: a tokenizer of sources and one of all other texts, whose pieces
        `backend` maps to ids (Marian: two languages share only the vocabulary). None for `backend`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        source_target_tokenizers: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None,
    ):
        # "<eos>" in a text is ordinary characters and never becomes the token.
        backend.encode_special_tokens = True
        self._backend, self.settings, self._source_target = backend, settings, source_target_tokenizers
        for part in source_target_tokenizers or ():
            part.encode_special_tokens = True
        # The saved padding and truncation are settings of batching, not of the text.
        backend.no_padding()
        backend.no_truncation()
        self._bytewise = isinstance(backend.decoder, decoders.ByteLevel)
        vocabulary = backend.get_vocab()
        eos = EOS if settings is None else _token_text(settings.get("eos_token") or settings.get("sep_token"))
        if eos not in vocabulary:
            problem = (
                f"was not made by attnlab: it has no token {eos}"
                if settings is None
                else f"has no eos_token, or its eos_token {eos} is not in its vocabulary"
            )
            raise InputError(f"this tokenizer {problem}")
        check_ids(vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names = [""] * self.vocab_size
        for name, token in vocabulary.items():
            self._names[token] = name
        self.eos_id = vocabulary[eos]

    @cached_property
    def mask_id(self) -> int:
        """The id of the mask token (BERT's [MASK]), or `eos_id`, which occurs in no text."""
        mask = (self.settings or {}).get("mask_token")
        return self.eos_id if mask is None else self._names.index(_token_text(mask))

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Return whether every id is the same token in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def token_id(self, name: str) -> int:
        """Return the id of a token by its name, such as `<|de|>`, special or not.

        Raises:
          InputError: there is no such token.
        """
        token = self._backend.token_to_id(check_unicode(name))
        if token is None:
            raise InputError(f"the tokenizer has no token {name!r}")
        return token

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, int32 (n,), without `eos_id`.

        Raises:
          InputError: a word is not in the vocabulary of a `Words` tokenizer, or the text is not
            valid Unicode.
        """
        check_unicode(text)
        if self._source_target is not None:
            return np.asarray(self._piece_ids(self._source_target[1], text), np.int32)
        try:
            ids = self._encoded(text, special_tokens=False).ids
        except InputError:
            unknown = next((w for w in text.split() if self._backend.token_to_id(w) is None), None)
            if self._bytewise or unknown is None:
                raise
            raise InputError(f"the word {unknown!r} is not in the vocabulary of the training split") from None
        return np.asarray(ids, np.int32)

    def _encoded(self, text: str, special_tokens: bool = True) -> tokenizers.Encoding:
        check_unicode(text)
        with one_line_errors(CANNOT_ENCODE):
            return self._backend.encode(text, add_special_tokens=special_tokens)

    def _piece_ids(self, pieces_of: tokenizers.Tokenizer, text: str) -> list[int]:
        """Return the ids of a text's pieces, after the language token at its start (>>deu<<)."""
        language = re.match("(>>.*?<<)?", text, re.DOTALL)[0]  # type: ignore[index]
        with one_line_errors(CANNOT_ENCODE):
            pieces = [*filter(None, [language]), *pieces_of.encode(text[len(language) :]).tokens]
            to_id, unknown = self._backend.token_to_id, self._backend.model.unk_token
            return [to_id(unknown) if (token := to_id(piece)) is None else token for piece in pieces]

    @cached_property
    def bos_tokens(self) -> list[int]:
        """The first tokens of a document: `eos_id`, or those of a checkpoint's tokenizer."""
        if self.settings is None:
            return [self.eos_id]
        encoded = self._encoded("a")
        return encoded.ids[: (*encoded.special_tokens_mask, 0).index(0)]

    @cached_property
    def prefix_tokens(self) -> list[int]:
        """The first tokens of a training text."""
        return self.bos_tokens or [self.eos_id]

    def with_prefix_tokens(self, *tokens: int) -> "Tokenizer":
        """Return a copy with other first tokens of training texts."""
        other = copy.copy(self)
        vars(other)["prefix_tokens"] = list(tokens)
        return other

    def encode_prompt(self, text: str, marker: int | None = None) -> list[int]:
        """Return the token ids of a prompt, after the first tokens of a document.

        Args:
          text: the prompt. Special tokens in it are ordinary text.
          marker: a special token that is recognised in the text (the image token).
        """
        tokenizer = self if marker is None else _with_image_token(self, marker)
        return [*self.bos_tokens, *tokenizer.encode(text).tolist()] or [self.eos_id]

    def encode_document(self, text: str, length: int | None = None) -> list[int]:
        """Return the token ids of a text between the special tokens of a checkpoint's tokenizer.

        Args:
          text: the document.
          length: maximum number of tokens. The text is truncated, not the special tokens.
        """
        if self.settings is None or self._source_target is not None:
            ids = self.encode(text)[: None if length is None else max(length - len(self.bos_tokens) - 1, 0)]
            return [*self.bos_tokens, *ids.tolist(), self.eos_id]
        encoded = self._encoded(text, special_tokens=False)
        if length is not None:
            encoded.truncate(max(length - self._backend.num_special_tokens_to_add(False), 0))
        return self._backend.post_process(encoded).ids

    def encode_source(self, text: str) -> list[int]:
        """Return the token ids of a source: with `eos_id`, or a checkpoint's special tokens."""
        if self.settings is None:
            return [*self.encode(text).tolist(), self.eos_id]
        if self._source_target is not None:
            return [*self._piece_ids(self._source_target[0], check_unicode(text)), self.eos_id]
        return self._encoded(text).ids or [self.eos_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a chat up to the start of the answer.

        Args:
          messages: each with "role" and "content".

        Raises:
          InputError: the tokenizer has no chat template, or the template refuses the messages.
        """
        template = (self.settings or {}).get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not isinstance(template, str):
            raise InputError("this tokenizer has no chat template: use plain text")
        tokens = {
            k: _token_text(v)
            for k, v in (self.settings or {}).items()
            if k.endswith("_token") and v is not None
        }
        for message in messages:
            check_unicode(message.get("content"))
        text = render(template, messages=messages, add_generation_prompt=True, **tokens)
        with one_line_errors(CANNOT_ENCODE):
            return self._parsing_backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        """A copy of the backend that parses special tokens; a copy takes seconds."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids without `eos_id`. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, int32 (V,); 0 for special tokens.

        A token of `Words` covers the word and the space after it.
        """
        sizes = [self._num_bytes(name) for name in self._names]
        for token, added in self._backend.get_added_tokens_decoder().items():
            if added.special:
                sizes[token] = 0
        return np.asarray(sizes, np.int32)

    def _num_bytes(self, name: str) -> int:
        if self._bytewise or re.fullmatch("<0x[0-9A-F]{2}>", name):
            return len(name) if self._bytewise else 1
        if isinstance(self._backend.model, models.WordPiece):
            prefix = self._backend.model.continuing_subword_prefix
            return len(name.removeprefix(prefix).encode()) + (not name.startswith(prefix))
        if isinstance(self._backend.model, models.WordLevel):
            return len(name.encode()) + 1
        return len(name.replace("\u2581", " ").encode())  # as SentencePiece writes a space

    def token_text(self, token: int) -> str:
        r"""Return the label of a token in a figure, such as `\xe2` for a part of a character.

        A model may have more tokens than its tokenizer; their label is the id.
        """
        name = self._names[token] if token < self.vocab_size else f"<{token}>"
        if not self._bytewise or not all(c in BYTE_OF_CHARACTER for c in name) or token == self.eos_id:
            return name
        return bytes(BYTE_OF_CHARACTER[c] for c in name).decode("utf-8", errors="backslashreplace")

    def with_hf_settings(self, template: str = f"{EOS} $A") -> "Tokenizer":
        """Return a copy with Hugging Face settings; `template` adds special tokens to a text A."""
        if self.settings is not None:
            return self
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(EOS, self.eos_id)]
        )
        settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS)
        return Tokenizer(backend, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    def save(self, path: epath.PathLike) -> None:
        """Write the tokenizer to a file, local or in a bucket, and its settings beside it."""
        file = epath.Path(path)
        file.write_text(self._backend.to_str(pretty=True))
        if self.settings is not None:
            (file.parent / CONFIG_FILE).write_text(json.dumps(self.settings, indent=2))
        for name, part in zip(SOURCE_TARGET_FILES, self._source_target or (), strict=False):
            (file.parent / name).write_text(part.to_str(pretty=True))

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Read a tokenizer written by `save`, or a `tokenizer.json` with settings in its folder."""
        file = epath.Path(path)
        if not file.exists():
            raise InputError(f"there is no tokenizer at {path}")
        settings = file.parent / CONFIG_FILE
        config = read_settings(settings) if settings.exists() else None
        source, target = (file.parent / name for name in SOURCE_TARGET_FILES)
        source_target_tokenizers = (read_backend(source), read_backend(target)) if source.exists() else None
        with one_line_errors(str(file)):
            return cls(read_backend(file), config, source_target_tokenizers)


@lru_cache(maxsize=1)  # writes and reads the whole vocabulary, too slow for every prompt
def _with_image_token(tokenizer: Tokenizer, marker: int) -> Tokenizer:
    """Return a tokenizer that recognises the token `marker` in texts."""
    backend = json.loads(tokenizer._backend.to_str())
    for token in backend["added_tokens"]:
        token["special"] &= token["id"] != marker
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)), tokenizer.settings)


def _token_text(token: Any) -> str:
    """Return the text of a special token, which settings store as text or in an object."""
    return token["content"] if isinstance(token, Mapping) else str(token)


@dataclass(frozen=True)
class Bytes:
    """One token per byte, and the end token: 257 in all. Lossless, without training."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Return the tokenizer; `texts` are ignored."""
        del texts
        return Tokenizer(_bytewise(models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[])))


@dataclass(frozen=True)
class BPE:
    """Lossless byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

    Raises:
      InputError: the vocabulary is too small for all bytes and the end token.
    """

    vocab_size: int = 4096
    """Number of tokens; smaller if the text has too few pairs to merge."""

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise InputError(
                f"BPE vocab_size must be 257 (256 bytes and the end) or more, not {self.vocab_size}"
            )

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Learn the merges of the first `TRAINING_CHARACTERS` of the texts."""
        backend = _bytewise(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[EOS],
            initial_alphabet=BYTE_CHARACTERS,
            show_progress=False,
        )
        backend.train_from_iterator(_limit_characters(TRAINING_CHARACTERS, texts), trainer)
        return Tokenizer(backend)


@dataclass(frozen=True)
class Words:
    """One token per whitespace-separated word, for small grammars. Whitespace is not preserved."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Collect every word of the texts, in alphabetical order."""
        words = sorted({word for text in texts for word in check_unicode(text).split()})
        if EOS in words:
            raise InputError(f"the word {EOS} in the training split is reserved for the end of a document")
        backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate([EOS, *words])}))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([EOS])
        return Tokenizer(backend)


def _bytewise(model: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return backend


def check_unicode(text: Any) -> Any:
    """Return a text that UTF-8 can encode, or a value that is no text.

    Raises:
      InputError: the text has a lone surrogate, which stands for a byte that is not UTF-8 if the
        text is an argument of a command or the name of a file.
    """
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise InputError(f"a text must be UTF-8, but its character {error.start} is {code}") from None
    return text


def _limit_characters(characters: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield check_unicode(text[:characters])
        characters -= len(text)
