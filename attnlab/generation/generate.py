"""Text from a decoder: one compiled prefill, one compiled decode loop, a stretch of tokens a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.data import Tokenizer
from attnlab.errors import InputError
from attnlab.generation.beam import Beams, beam_search
from attnlab.generation.prefix import Prefix, prefill
from attnlab.generation.sampling import Sampling, row_keys, sample

STRETCH = 16  # tokens decoded between looks at stop strings and the terminal
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Completion:
    """What came after a prompt.

    Attributes:
      prompt: the text given.
      text: the text generated, up to but not with a stop string.
      tokens: the ids generated.
      ended: why it ended: "eos", "stop" (a stop string), "length" (as many tokens as asked), or "context".
      score: of a beam search, the log-probability of the tokens divided by the penalty of their number.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: str
    score: float | None = None


class Generator:
    """Generates with one model, its programs compiled once for each number of rows and slots.

    Args:
      model: a decoder whose layers are all causal.
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
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        num_samples: int = 1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Completions of each prompt, `num_samples` in a row for the first, then the second, and so on.

        Args:
          prompts: texts, of any lengths.
          max_new_tokens: most tokens to add to each.
          num_samples: completions of each prompt.
          sampling: how tokens are drawn.
          stop: strings that end a completion.
          seed: of the draws; a row's draws do not depend on the other rows.
          stream: called with (row, new text) as text becomes certain.

        Raises:
          InputError: a prompt that leaves no room in the context, or an empty stop string.
        """
        if isinstance(stop, str) or not all(stop):
            raise InputError(f"stop must be a list of strings of at least one character, not {stop!r}")
        ids = [self._encode(prompt) for prompt in prompts for _ in range(num_samples)]
        room = self.context - max(map(len, ids))
        steps = min(max_new_tokens, room)
        rows = [_Row(prompt, self.tokenizer, stop) for prompt in prompts for _ in range(num_samples)]
        with jax.set_mesh(self.mesh):
            state = _start(self._prefill(ids, _stretches(steps)), seed)
            for start in range(0, steps, STRETCH):
                state, tokens = _decode(
                    self.model, self.tokenizer.eos_id, sampling or Sampling(), self.params, state
                )
                for i, (row, new) in enumerate(zip(rows, np.asarray(tokens), strict=False)):
                    fresh = row.add(new[: steps - start].tolist())
                    if stream is not None and fresh:
                        stream(i, fresh)
                if all(row.ended for row in rows):
                    break
        limit = "length" if steps == max_new_tokens else "context"
        for i, row in enumerate(rows):
            rest = row.end(limit)
            if stream is not None and rest:
                stream(i, rest)
        return [row.completion() for row in rows]

    def search(
        self,
        prompts: Sequence[str],
        beams: Beams,
        *,
        max_new_tokens: int = 128,
        num_samples: int = 1,
    ) -> list[Completion]:
        """The best completions of each prompt that a beam search finds, at most `num_samples`.

        Args:
          prompts: texts, of any lengths.
          beams: how to search; see `beam_search`.
          max_new_tokens: most tokens to add to each, at least 1.
          num_samples: completions of each prompt, best first.

        Raises:
          InputError: a prompt that leaves no room in the context, or more samples than beams.
        """
        if not 1 <= num_samples <= beams.count:
            raise InputError(
                f"num_samples={num_samples} must be at least 1, and at most the {beams.count} beams"
            )
        ids = [self._encode(prompt) for prompt in prompts]
        steps = min(max_new_tokens, self.context - max(map(len, ids)))
        slots = _stretches(steps)
        with jax.set_mesh(self.mesh):
            found = beam_search(
                self.model,
                self.params,
                self._prefill(ids, slots),
                count=beams.count,
                penalty=beams.penalty,
                eos_id=self.tokenizer.eos_id,
                slots=slots,
                steps=steps,
            )
        limit = "length" if steps == max_new_tokens else "context"
        completions = []
        for prompt, texts, scores in zip(
            prompts, np.asarray(found.tokens), np.asarray(found.scores), strict=False
        ):
            for tokens, score in zip(texts[:num_samples], scores, strict=False):
                row = _Row(prompt, self.tokenizer, ())
                row.add(tokens[:steps].tolist())
                row.end(limit)
                if np.isfinite(score):
                    completions.append(replace(row.completion(), score=float(score)))
        return completions

    def _encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.prompt(prompt)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the model's context holds {self.context}: "
                f"use one of at most {self.context - 1}"
            )
        return ids

    def _prefill(self, ids: list[list[int]], room: int) -> Prefix:
        """The prompts read, padded on the left so that all end together, with room for more tokens."""
        # Lengths and rows in powers of two, so that few programs are compiled.
        length = max(max(map(len, ids)), min(_power_of_two(max(map(len, ids))), self.context - room))
        pieces = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        count = -(-_power_of_two(len(ids)) // pieces) * pieces
        tokens = np.zeros((count, length), np.int32)
        segments = np.zeros((count, length), np.int32)
        for i in range(count):
            row = ids[i] if i < len(ids) else ids[0]
            tokens[i, length - len(row) :] = row
            segments[i, length - len(row) :] = 1
        put = partial(jax.device_put, device=sharding.named(self.mesh, P(("data", "fsdp"), None)))
        return prefill(self.model, length + room, self.params, put(tokens), put(segments))


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

    def __init__(self, prompt: str, tokenizer: Tokenizer, stop: Sequence[str]):
        self.prompt, self.ended = prompt, ""
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
        return Completion(self.prompt, self._text, self._tokens, self.ended)


def _stretches(steps: int) -> int:
    """Room for so many tokens, in whole stretches."""
    return -(-steps // STRETCH) * STRETCH


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def printable(text: str) -> str:
    """`text` with control characters made visible: a model may write them, and a terminal would obey."""
    return text.translate(_PICTURES)
