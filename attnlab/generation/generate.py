"""Text from a model: one compiled prefill, one compiled decode loop, a stretch of tokens a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.attention.cache import Cache
from attnlab.data import Tokenizer
from attnlab.errors import InputError
from attnlab.generation import source_inputs
from attnlab.generation.beam import Beams, beam_search
from attnlab.generation.decode_state import Prefix, prefill
from attnlab.generation.sampling import Sampling, row_keys, sample
from attnlab.generation.speculative import Draft, Drafted, Lookup, begin, speculate

STRETCH = 16  # tokens decoded between looks at stop strings and the terminal
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Completion:
    """What came after a prompt, or of a source.

    Attributes:
      prompt: the text given to go on from.
      text: the text generated, up to but not with a stop string.
      tokens: the ids generated.
      ended: why it ended: "eos", "stop" (a stop string), "length" (as many tokens as asked), or "context".
      score: of a beam search, the log-probability of the tokens divided by the penalty of their number.
      source: the text that was read beside the prompt, if any.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: str
    score: float | None = None
    source: str | None = None

    @property
    def head(self) -> str:
        """What it was made of, as is to be shown before its text."""
        return self.prompt if self.source is None else f"{self.source}\n{self.prompt}"


class Generator:
    """Generates with one model, its programs compiled once for each number of rows and slots.

    Args:
      model: whatever writes tokens and sees no later ones; perhaps of a source that it reads.
      params: its parameters.
      tokenizer: its tokenizer.
      context: the most tokens a row may hold, prompt and all.
      mesh: where the parameters lie.

    Raises:
      InputError: a model that looks ahead.
    """

    def __init__(self, model: nn.Module, params, tokenizer: Tokenizer, context: int, mesh: Mesh):
        if not model.config.causal:
            raise InputError("a model with Bidirectional layers reads whole texts: it cannot generate them")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.context, self.mesh = context, mesh

    def __call__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        sources: Sequence[Any] | None = None,
        forced: Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        num_samples: int = 1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
        guesses: Lookup | Draft | None = None,
    ) -> list[Completion]:
        """Completions of each prompt, `num_samples` in a row for the first, then the second, and so on.

        Args:
          prompts: texts to go on from, of any lengths; beside sources they may be left out.
          sources: what is read beside each prompt: texts, or arrays as of `ModelConfig.source_shape`.
          forced: the first tokens of each completion, by number or name; None is the model's own.
          max_new_tokens: most tokens to add to each.
          num_samples: completions of each prompt.
          sampling: how tokens are drawn.
          stop: strings that end a completion.
          seed: of the draws; a row's draws do not depend on the other rows.
          stream: called with (row, new text) as text becomes certain.
          guesses: how next tokens are guessed, to be checked several at a time; None is not at all.

        Raises:
          InputError: a prompt that leaves no room in the context, an empty stop string, sources that are
            not what the model reads, or guesses of models that cannot be checked by this one.
        """
        if isinstance(stop, str) or not all(stop):
            raise InputError(f"stop must be a list of strings of at least one character, not {stop!r}")
        forced = self._forced(forced, max_new_tokens)
        given = [task for task in self._tasks(prompts, sources, forced) for _ in range(num_samples)]
        steps = self._steps(given, forced, max_new_tokens)
        limit = "length" if steps == max_new_tokens else "context"
        steps -= len(forced) + self.model.config.ends  # those that are drawn
        rows = [_Row(task, self.tokenizer, stop) for task in given]
        for i, row in enumerate(rows):
            fresh = row.add(list(forced))
            if stream is not None and fresh:
                stream(i, fresh)
        with jax.set_mesh(self.mesh):
            write = self._write if guesses is None else partial(self._speculate, guesses)
            written = 0
            for tokens in write(given, steps, sampling or Sampling(), seed):
                for i, (row, new) in enumerate(zip(rows, tokens, strict=False)):
                    fresh = row.add(new[: steps - written].tolist())
                    if stream is not None and fresh:
                        stream(i, fresh)
                written += tokens.shape[1]
                if written >= steps or all(row.ended for row in rows):
                    break
        for i, row in enumerate(rows):
            rest = row.end(limit)
            if stream is not None and rest:
                stream(i, rest)
        return [row.completion() for row in rows]

    def search(
        self,
        prompts: Sequence[str] | None,
        beams: Beams,
        *,
        sources: Sequence[Any] | None = None,
        forced: Sequence[int | str] | None = None,
        max_new_tokens: int = 128,
        num_samples: int = 1,
    ) -> list[Completion]:
        """The best completions of each prompt that a beam search finds, at most `num_samples`.

        Args:
          prompts: texts to go on from, of any lengths; None only beside sources.
          beams: how to search; see `beam_search`.
          sources: what is read beside each prompt; see `__call__`.
          forced: the first tokens of each completion, by number or name; None is the model's own.
          max_new_tokens: most tokens to add to each, at least 1.
          num_samples: completions of each prompt, best first.

        Raises:
          InputError: a prompt that leaves no room in the context, more samples than beams, or sources that
            are not what the model reads.
        """
        if not 1 <= num_samples <= beams.count:
            raise InputError(
                f"num_samples={num_samples} must be at least 1, and at most the {beams.count} beams"
            )
        forced = self._forced(forced, max_new_tokens)
        given = self._tasks(prompts, sources, forced)
        steps = self._steps(given, forced, max_new_tokens)
        slots = _stretches(steps)
        with jax.set_mesh(self.mesh):
            found = beam_search(
                self.model,
                self.params,
                self._prefill(given, slots),
                count=beams.count,
                penalty=beams.penalty,
                eos_id=self.tokenizer.eos_id,
                slots=slots,
                steps=steps,
                forced=forced,
            )
        limit = "length" if steps == max_new_tokens else "context"
        completions = []
        for task, texts, scores in zip(
            given, np.asarray(found.tokens), np.asarray(found.scores), strict=False
        ):
            for tokens, score in zip(texts[:num_samples], scores, strict=False):
                row = _Row(task, self.tokenizer, ())
                row.add(tokens[: steps - self.model.config.ends].tolist())
                row.end(limit)
                if np.isfinite(score):
                    completions.append(replace(row.completion(), score=float(score)))
        return completions

    def _write(self, given: Sequence["_Task"], steps: int, sampling: Sampling, seed: int):
        """The next tokens of every row, (B, STRETCH), again and again."""
        prefix = self._prefill(given, _stretches(steps))
        state = _start(prefix, seed)
        for _ in range(0, steps, STRETCH):
            state, tokens = _decode(self.model, self.tokenizer.eos_id, sampling, self.params, state)
            yield np.asarray(tokens)

    def _speculate(
        self, guesses: Lookup | Draft, given: Sequence["_Task"], steps: int, sampling: Sampling, seed: int
    ):
        """The same, some at a time, of guesses that are checked."""
        if steps < 1:
            return
        room, rows = _stretches(steps) + guesses.count + 1, STRETCH + guesses.count + 1
        prefix = self._prefill(given, room)
        guesser: Lookup | Drafted
        if isinstance(guesses, Draft):
            other = guesses.generator
            drafting = other._prefill(given, room)
            if prefix.logits.shape != drafting.logits.shape or not self.tokenizer.agrees(other.tokenizer):
                raise InputError("a draft must be a model of the same tokens as the one that checks it")
            guesser, params, memo = Drafted(other.model, guesses.count), other.params, drafting.cache
        else:
            tokens, segments = self._padded(given, room)
            texts = np.pad(np.where(segments > 0, tokens, -1), ((0, 0), (0, room)), constant_values=-1)
            guesser, params, memo = guesses, None, self._put(texts)
        if not isinstance(prefix.cache, Cache) or not isinstance(memo, Cache | jax.Array):
            raise InputError("a recurrent model cannot take back what it has read: it goes without guesses")
        options = {"sampling": sampling, "eos_id": self.tokenizer.eos_id}
        start = _start(prefix, seed)
        state = begin(start.prefix, memo, start.keys, looks_up=params is None, **options)
        yield np.asarray(state.last)[:, None]
        written = 1
        while written < steps:
            limit = min(STRETCH, steps - written)
            state, tokens, number = speculate(
                self.model, self.params, guesser, params, state, room=rows, limit=limit, **options
            )
            written += int(number)
            yield np.asarray(tokens)[:, : int(number)]

    def _forced(self, forced: Sequence[int | str] | None, max_new_tokens: int) -> tuple[int, ...]:
        given = self.model.config.forced if forced is None else forced
        found = tuple(self.tokenizer.token(each) if isinstance(each, str) else each for each in given)
        if found and max_new_tokens <= len(found):
            raise InputError(f"max_new_tokens must be over the {len(found)} that are forced")
        return found

    def _steps(self, given: Sequence["_Task"], forced: tuple[int, ...], max_new_tokens: int) -> int:
        """Most tokens of a completion, those that are forced among them."""
        return min(max_new_tokens, self.context - max(len(task.ids) for task in given) + len(forced))

    def _tasks(self, prompts, sources, forced: tuple[int, ...]) -> list["_Task"]:
        config = self.model.config
        if sources is None:
            if config.source_shape is not None or prompts is None:
                raise InputError(f"the model needs {'prompts' if config.source_shape is None else 'sources'}")
            return [_Task(prompt, [*self._encode(prompt), *forced]) for prompt in prompts]
        prompts = [""] * len(sources) if prompts is None else prompts
        if len(prompts) != len(sources):
            raise InputError(f"there are {len(prompts)} prompts to {len(sources)} sources")
        return [
            _Task(
                prompt, [*self._encode(prompt), *forced], array, source if isinstance(source, str) else None
            )
            for prompt, source, array in zip(
                prompts, sources, source_inputs.arrays(config, self.tokenizer, sources), strict=True
            )
        ]

    def _encode(self, prompt: str) -> list[int]:
        """What is read of the text before anything is written."""
        ids = source_inputs.prompt(self.model.config, self.tokenizer, prompt)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the model's context holds {self.context}: "
                f"use one of at most {self.context - 1}"
            )
        return ids

    def _padded(self, given: Sequence["_Task"], room: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of the prompts, padded on the left so that all end together."""
        ids = [task.ids for task in given]
        # Lengths and rows in powers of two, so that few programs are compiled.
        length = max(max(map(len, ids)), min(_power_of_two(max(map(len, ids))), self.context - room))
        tokens, segments = np.zeros((2, self._count(given), length), np.int32)
        for i, row in enumerate([*ids, *[ids[0]] * (len(tokens) - len(ids))]):
            tokens[i, length - len(row) :] = row
            segments[i, length - len(row) :] = 1
        return tokens, segments

    def _count(self, given: Sequence["_Task"]) -> int:
        pieces = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-_power_of_two(len(given)) // pieces) * pieces

    def _put(self, x):
        """Rows of arrays, laid out over the mesh."""
        return jax.device_put(x, sharding.named(self.mesh, P(("data", "fsdp"))))

    def _prefill(self, given: Sequence["_Task"], room: int) -> Prefix:
        """The prompts read, with room for more tokens."""
        tokens, segments = self._padded(given, room)
        given = [*given, *[given[0]] * (len(tokens) - len(given))]
        arrays = [task.source for task in given if task.source is not None]
        source = source_inputs.rows(arrays, self.model.config.source_shape) if arrays else {}
        slots = tokens.shape[1] + room
        return prefill(
            self.model, slots, self.params, *map(self._put, (tokens, segments)), **self._put(source)
        )


@dataclass(frozen=True)
class _Task:
    """What one row is to be made of.

    Attributes:
      prompt: the text to go on from.
      ids: all that is read before the first token that is drawn.
      source: what is read beside it.
      text: the source as it was given, if it was a text.
    """

    prompt: str
    ids: list[int]
    source: np.ndarray | None = None
    text: str | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Between two tokens: what was read, and of each row its random key and whether it ended."""

    prefix: Prefix
    keys: jax.Array
    done: jax.Array


@partial(jax.jit, donate_argnums=0)
def _start(prefix: Prefix, seed) -> _State:
    positions = prefix.positions
    keys = row_keys(jax.random.key(seed), jnp.arange(len(positions)))
    return _State(prefix, sharding.constrain(keys, "batch"), jnp.zeros_like(positions, bool))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(model: nn.Module, eos_id: int, sampling: Sampling, params, state: _State):
    """The next stretch of tokens of every row, (B, STRETCH); a row past its end repeats the end."""

    def one(state: _State, _):
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.prefix.positions)
        token = jnp.where(state.done, eos_id, sample(keys, state.prefix.logits, sampling))
        prefix = state.prefix.read(model, params, token)
        return _State(prefix, state.keys, state.done | (token == eos_id)), token

    state, tokens = jax.lax.scan(one, state, length=STRETCH)
    return state, tokens.T


class _Row:
    """One row's text as it grows."""

    def __init__(self, task: _Task, tokenizer: Tokenizer, stop: Sequence[str]):
        self._task, self.ended = task, ""
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._text = ""
        self._given = 0

    def add(self, tokens: list[int]) -> str:
        """Takes new tokens; returns the text that is now certain and was not given before."""
        if self.ended:
            return ""
        if self._tokenizer.eos_id in tokens:
            tokens = tokens[: tokens.index(self._tokenizer.eos_id)]
            self.ended = "eos"
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
            self.ended = "stop"
        self._tokens += tokens
        self._text = text
        return self._fresh(0 if self.ended else self._uncertain())

    def _fresh(self, uncertain: int) -> str:
        certain = self._text[: len(self._text) - uncertain]
        fresh, self._given = certain[self._given :], max(self._given, len(certain))
        return fresh

    def _uncertain(self) -> int:
        """Characters at the end that a next token may change: half a character after half a stop string."""
        text = self._text.rstrip("\N{REPLACEMENT CHARACTER}")
        half = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return len(self._text) - len(text) + half

    def end(self, limit: str) -> str:
        """Ends a row that has not ended by itself; returns the text that was still uncertain."""
        self.ended = self.ended or limit
        return self._fresh(0)

    def completion(self) -> Completion:
        """The finished row."""
        return Completion(self._task.prompt, self._text, self._tokens, self.ended, source=self._task.text)


def _stretches(steps: int) -> int:
    """Room for so many tokens, in whole stretches."""
    return -(-steps // STRETCH) * STRETCH


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def printable(text: str) -> str:
    """`text` with control characters made visible: a model may write them, and a terminal would obey."""
    return text.translate(_PICTURES)
