"""Completions, and incremental detokenization."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.data import Tokenizer

_CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_CONTROL_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Completion:
    """The text generated after a prompt, or from a source.

    Attributes:
      prompt: the text that is continued.
      text: the generated text, up to a stop string.
      tokens: the generated ids.
      finish_reason: "eos", "stop" (a stop string), "length" (`max_new_tokens`), or "context".
      score: for beam search, the log-probability of the tokens divided by the length penalty.
      source: the source, if it is a text.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    score: float | None = None
    source: str | None = None

    @property
    def head(self) -> str:
        """The inputs, for display before the text."""
        return self.prompt if self.source is None else f"{self.source}\n{self.prompt}"


@dataclass(frozen=True)
class GenerationInput:
    """The inputs of one row.

    Attributes:
      prompt: the text to continue.
      ids: token ids of the prompt, with forced and special tokens.
      source: encoder input.
      source_text: the source, if it is a text.
    """

    prompt: str
    ids: list[int]
    source: np.ndarray | None = None
    source_text: str | None = None


class IncrementalDetokenizer:
    """The growing text of one row, which ends at an end token or at a stop string."""

    def __init__(
        self, inputs: GenerationInput, tokenizer: Tokenizer, stop: Sequence[str], eos_ids: Sequence[int]
    ):
        self._inputs, self.finish_reason, self._eos_ids = inputs, "", eos_ids
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._text = ""
        self._num_emitted = 0

    def add(self, tokens: list[int]) -> str:
        """Add tokens and return the new text that later tokens cannot change."""
        if self.finish_reason:
            return ""
        end = next((i for i, token in enumerate(tokens) if token in self._eos_ids), None)
        if end is not None:
            tokens, self.finish_reason = tokens[:end], "eos"
        text = self._tokenizer.decode(self._tokens + tokens)
        if any(s in text for s in self._stop):
            # The first token that completes a stop string is the last.
            counts = range(1, len(tokens) + 1)
            texts = [self._tokenizer.decode(self._tokens + tokens[:n]) for n in counts]
            count = next(
                n for n, text in zip(counts, texts, strict=True) if any(s in text for s in self._stop)
            )
            tokens, text = tokens[:count], texts[count - 1]
            text = text[: min(text.find(s) for s in self._stop if s in text)]
            self.finish_reason = "stop"
        self._tokens += tokens
        self._text = text
        return self._emit(0 if self.finish_reason else self._num_uncertain())

    def _emit(self, num_uncertain: int) -> str:
        certain = self._text[: len(self._text) - num_uncertain]
        new, self._num_emitted = certain[self._num_emitted :], max(self._num_emitted, len(certain))
        return new

    def _num_uncertain(self) -> int:
        """Count the final characters that a later token may change."""
        text = self._text.rstrip("\N{REPLACEMENT CHARACTER}")
        half = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return len(self._text) - len(text) + half

    def end(self, reason: str) -> str:
        """End the text unless it has ended, and return the remaining text."""
        self.finish_reason = self.finish_reason or reason
        return self._emit(0)

    def completion(self) -> Completion:
        """Return the finished row."""
        inputs = self._inputs
        return Completion(
            inputs.prompt, self._text, self._tokens, self.finish_reason, source=inputs.source_text
        )


def printable(text: str) -> str:
    """Return `text` with visible control characters, so that a terminal does not execute them."""
    return text.translate(_CONTROL_PICTURES)
