"""Tokenizers: three kinds to train, those that checkpoints come with, one object to use."""

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
from attnlab.errors import InputError

EOS = "<eos>"
CONFIG_FILE = "tokenizer_config.json"
SOURCE_TARGET_FILES = ("source.tokenizer.json", "target.tokenizer.json")

# Characters of text that a BPE learns from: merges settle long before, and memory stays small.
TRAINING_CHARACTERS = 2**25


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class Tokenizer:
    """Text to token ids and back; saved and loaded as a `tokenizer.json` of the `tokenizers` library.

    Args:
      backend: the library's tokenizer.
      settings: of a tokenizer that was made elsewhere, its `tokenizer_config.json`, kept beside the other
        file: which token ends a text, and how chats are written. None is one of this module's.
      source_target_tokenizers: one splits sources, the other all other texts, into pieces that `backend` maps
        to ids, for a translator whose two languages share only the vocabulary (Marian). None: `backend`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        source_target_tokenizers: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None,
    ):
        # Bytewise, "<eos>" in a text is five characters like any other and never becomes the token.
        backend.encode_special_tokens = True
        self._backend, self.settings, self._source_target = backend, settings, source_target_tokenizers
        for part in source_target_tokenizers or ():
            part.encode_special_tokens = True
        # How whoever saved it made batches is no part of a text.
        backend.no_padding()
        backend.no_truncation()
        self._bytewise = isinstance(backend.decoder, decoders.ByteLevel)
        vocabulary = backend.get_vocab()
        eos = EOS if settings is None else _token_text(settings.get("eos_token") or settings.get("sep_token"))
        if eos not in vocabulary:
            problem = (
                "was not made by attnlab: it" if settings is None else "names no eos_token, or one that it"
            )
            raise InputError(f"this tokenizer {problem} has no token {eos}")
        self.vocab_size = max(vocabulary.values()) + 1
        self._names = [""] * self.vocab_size
        for name, token in vocabulary.items():
            self._names[token] = name
        self.eos_id = vocabulary[eos]

    @cached_property
    def mask_id(self) -> int:
        """What stands for a token that is to be found: BERT's [MASK], or the end, which stands in no text."""
        mask = (self.settings or {}).get("mask_token")
        return self.eos_id if mask is None else self._names.index(_token_text(mask))

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether each number is the same token."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def token_id(self, name: str) -> int:
        """The id of a token by its name, `<|de|>` say, special or not.

        Raises:
          InputError: no such token.
        """
        token = self._backend.token_to_id(name)
        if token is None:
            raise InputError(f"the tokenizer has no token {name!r}")
        return token

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 (n,), without any `eos_id`.

        Raises `InputError` naming the word if a `Words` tokenizer has not met it in training.
        """
        if self._source_target is not None:
            return np.asarray(self._piece_ids(self._source_target[1], text), np.int32)
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception:
            unknown = next((w for w in text.split() if self._backend.token_to_id(w) is None), None)
            if self._bytewise or unknown is None:
                raise
            raise InputError(
                f"the word {unknown!r} is not in the vocabulary, made of the training split"
            ) from None
        return np.asarray(ids, np.int32)

    def _piece_ids(self, pieces_of: tokenizers.Tokenizer, text: str) -> list[int]:
        """Numbers of a text's pieces, and before them of the language that it begins with, as >>deu<<."""
        language = re.match("(>>.*?<<)?", text, re.DOTALL)[0]  # type: ignore[index]
        pieces = [*filter(None, [language]), *pieces_of.encode(text[len(language) :]).tokens]
        number, unknown = self._backend.token_to_id, self._backend.model.unk_token
        return [number(unknown) if (token := number(piece)) is None else token for piece in pieces]

    @cached_property
    def bos_tokens(self) -> list[int]:
        """What a document begins with: the end of another, or what a tokenizer made elsewhere puts first."""
        if self.settings is None:
            return [self.eos_id]
        encoded = self._backend.encode("a")
        return encoded.ids[: (*encoded.special_tokens_mask, 0).index(0)]

    @cached_property
    def prefix_tokens(self) -> list[int]:
        """What a text to learn begins with."""
        return self.bos_tokens or [self.eos_id]

    def with_prefix_tokens(self, *tokens: int) -> "Tokenizer":
        """The same for a model whose texts to learn begin otherwise."""
        other = copy.copy(self)
        vars(other)["prefix_tokens"] = list(tokens)
        return other

    def encode_prompt(self, text: str, marker: int | None = None) -> list[int]:
        """Token ids of a text to go on from, after those that a document begins with.

        Args:
          text: of which no part is a special token,
          marker: but for this one, wherever it is written.
        """
        tokenizer = self if marker is None else _with_image_token(self, marker)
        return [*self.bos_tokens, *tokenizer.encode(text).tolist()] or [self.eos_id]

    def encode_document(self, text: str, length: int | None = None) -> list[int]:
        """Token ids of a whole text, between those that a tokenizer made elsewhere puts around it.

        Args:
          text: the document.
          length: the most tokens that there may be: the text is cut, not what is around it.
        """
        if self.settings is None or self._source_target is not None:
            ids = self.encode(text)[: None if length is None else max(length - len(self.bos_tokens) - 1, 0)]
            return [*self.bos_tokens, *ids.tolist(), self.eos_id]
        encoded = self._backend.encode(text, add_special_tokens=False)
        if length is not None:
            encoded.truncate(max(length - self._backend.num_special_tokens_to_add(False), 0))
        return self._backend.post_process(encoded).ids

    def encode_source(self, text: str) -> list[int]:
        """Token ids of a text to be read whole: with its end, or what others' tokenizers put around."""
        if self.settings is None:
            return [*self.encode(text).tolist(), self.eos_id]
        if self._source_target is not None:
            return [*self._piece_ids(self._source_target[0], text), self.eos_id]
        return self._backend.encode(text).ids or [self.eos_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat, up to where its answer begins.

        Args:
          messages: each with "role" and "content".

        Raises:
          InputError: a tokenizer without a chat template, or messages that it refuses.
        """
        template = (self.settings or {}).get("chat_template")
        if isinstance(template, list):  # several of them, by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not isinstance(template, str):
            raise InputError("this tokenizer has no chat template: give it plain text")
        tokens = {
            k: _token_text(v)
            for k, v in (self.settings or {}).items()
            if k.endswith("_token") and v is not None
        }
        text = render(template, messages=messages, add_generation_prompt=True, **tokens)
        parsing = tokenizers.Tokenizer.from_str(self._backend.to_str())  # of which special tokens are tokens
        return parsing.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without any `eos_id`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 (V,); 0 for `eos_id` and its like.

        A token of `Words` stands for the word and the space after it.
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
        r"""How to show a token in a figure; part of a character as `\xe2`, the end as `<eos>`.

        A model may have more tokens than its tokenizer: these are shown by their number.
        """
        name = self._names[token] if token < self.vocab_size else f"<{token}>"
        if not self._bytewise or not all(c in BYTE_OF_CHARACTER for c in name) or token == self.eos_id:
            return name
        return bytes(BYTE_OF_CHARACTER[c] for c in name).decode("utf-8", errors="backslashreplace")

    def with_hf_settings(self, template: str = f"{EOS} $A") -> "Tokenizer":
        """The same for those who read a tokenizer's settings, with what they are to put around a text A."""
        if self.settings is not None:
            return self
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(EOS, self.eos_id)]
        )
        settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS)
        return Tokenizer(backend, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    def save(self, path: epath.PathLike) -> None:
        """Write the tokenizer to a file, local or in a bucket; its settings beside it."""
        file = epath.Path(path)
        file.write_text(self._backend.to_str(pretty=True))
        if self.settings is not None:
            (file.parent / CONFIG_FILE).write_text(json.dumps(self.settings, indent=2))
        for name, part in zip(SOURCE_TARGET_FILES, self._source_target or (), strict=False):
            (file.parent / name).write_text(part.to_str(pretty=True))

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Read a tokenizer that `save` wrote, or a `tokenizer.json` with its settings beside it."""
        file = epath.Path(path)
        settings = file.parent / CONFIG_FILE
        try:
            config = json.loads(settings.read_text()) if settings.exists() else None
            source, target = (file.parent / name for name in SOURCE_TARGET_FILES)
            source_target_tokenizers = (
                (_read_backend(source), _read_backend(target)) if source.exists() else None
            )
            return cls(_read_backend(file), config, source_target_tokenizers)
        except FileNotFoundError:
            raise InputError(f"there is no tokenizer at {path}") from None


@lru_cache(maxsize=1)  # a whole vocabulary is written and read, which is not for every prompt
def _with_image_token(tokenizer: Tokenizer, marker: int) -> Tokenizer:
    """With one token less that is special, and so no part of a text."""
    backend = json.loads(tokenizer._backend.to_str())
    for token in backend["added_tokens"]:
        token["special"] &= token["id"] != marker
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)), tokenizer.settings)


def _read_backend(file: epath.Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(file.read_text())


def _token_text(token: Any) -> str:
    """The text of a special token, which settings have as text or as an object around it."""
    return token["content"] if isinstance(token, Mapping) else str(token)


@dataclass(frozen=True)
class Bytes:
    """A token for each of the 256 bytes, and the end: 257 in all. Nothing to train, nothing lost."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer; texts are not looked at."""
        del texts
        return Tokenizer(_bytewise(models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[])))


@dataclass(frozen=True)
class BPE:
    """Byte-pair encoding over bytes: any text comes back exactly (Sennrich et al. 2016, arXiv:1508.07909).

    Raises `InputError` if the vocabulary has no room for all bytes and the end.
    """

    vocab_size: int = 4096
    """Tokens in all; fewer come out if the text has not as many pairs to merge."""

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
    """A token for each word between white space, for small grammars; white space itself is lost."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Collect every word of the texts, in alphabetical order."""
        words = sorted({word for text in texts for word in text.split()})
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


def _limit_characters(characters: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
