"""Beam search: the likeliest texts, by keeping the best few of each length."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.errors import InputError
from attnlab.generation.decode_state import Prefix
from attnlab.generation.sampling import whole_rows
from attnlab.sharding import out_sharding


@dataclass(frozen=True)
class Power:
    """|Y|^alpha: over 0, longer texts are preferred; 1 compares mean log-probabilities."""

    alpha: float = 1.0

    def __post_init__(self):
        _require_finite(self)

    def __call__(self, length: Int[Array, ""]) -> Float[Array, ""]:
        """What the log-probability of a text of this length is divided by."""
        return length.astype(jnp.float32) ** self.alpha


@dataclass(frozen=True)
class Wu:
    """((5 + |Y|) / 6)^alpha (Wu et al. 2016, arXiv 1609.08144, equation 14)."""

    alpha: float = 0.6

    def __post_init__(self):
        _require_finite(self)

    def __call__(self, length: Int[Array, ""]) -> Float[Array, ""]:
        """What the log-probability of a text of this length is divided by."""
        return ((5 + length.astype(jnp.float32)) / 6) ** self.alpha


def _require_finite(penalty: Power | Wu) -> None:
    if not math.isfinite(penalty.alpha):
        raise InputError(f"{type(penalty).__name__}.alpha is {penalty.alpha}; it must be a finite number")


@dataclass(frozen=True)
class Beams:
    """How to search.

    Attributes:
      count: texts kept of each length, k.
      penalty: what log-probabilities of texts of unequal length are divided by to be compared.
    """

    count: int = 4
    penalty: Power | Wu = Power()

    def __post_init__(self):
        if self.count < 1:
            raise InputError(f"Beams.count is {self.count}; it must be at least 1")


class Texts(NamedTuple):
    """k texts a row, best first: their tokens, filled up with the end, and what they are ordered by.

    The score of a text still growing is its log-probability, that of a finished one is divided by the
    penalty of its length, and that of a place without a text is -inf.
    """

    tokens: Int[Array, "B k T"]
    scores: Float[Array, "B k"]

    def best(self, count: int) -> tuple["Texts", Int[Array, "B count"]]:
        """The best so many, and where they were."""
        scores, places = jax.lax.top_k(self.scores, count)
        return Texts(_pick(self.tokens, places), scores), places


class _State(NamedTuple):
    """Between two tokens.

    Attributes:
      length: tokens of every growing text.
      growing: texts that go on.
      parents: which of the texts before the last token each of them came from; the cache still has those.
      finished: texts that ended.
      open: whether a row can still get a better text.
      prefix: all that was read, B * k rows.
    """

    length: Int[Array, ""]
    growing: Texts
    parents: Int[Array, "B k"]
    finished: Texts
    open: Bool[Array, " B"]
    prefix: Prefix


@partial(jax.jit, static_argnames=("model", "count", "penalty", "slots", "eos_id", "forced"))
def beam_search(
    model,
    params,
    prefix: Prefix,
    *,
    count: int,
    penalty: Power | Wu,
    eos_id: int,
    slots: int,
    steps,
    forced: tuple[int, ...] = (),
) -> Texts:
    """The `count` best texts that a beam search finds to come after what was read, and their scores.

    Each step extends every growing text by every token. Of the 2k likeliest, those among the first k that
    end, by `eos_id` or by their length, compete for the k places of finished texts; the k likeliest of the
    others go on. The last token of a model that `ends` is `eos_id`. A row is done when its likeliest growing
    text, scored as if it ended now, is no better than its worst finished one, all places being taken. (A
    later end could score higher if the penalty is over 1; this is the rule that Hugging Face's generate calls
    early_stopping=False.)

    Args:
      model: a decoder; see `forward`.
      params: its parameters.
      prefix: what was read, with at least `steps` - 1 free slots in its cache.
      count: k.
      penalty: of lengths.
      eos_id: the token that ends a text, and fills it up.
      slots: T, tokens that a text has room for.
      steps: its most tokens, at most `slots`; may be traced.
      forced: the first tokens of every text, fewer than `steps`, which were the last to be read.
    """
    # Of an end in every place, and of what every text begins with.
    begun = jnp.array([*forced, *[eos_id] * (slots - len(forced))], jnp.int32)
    nothing = jnp.zeros_like(prefix.positions)[:, None, None] + jnp.tile(begun, (1, count, 1))
    none = jnp.full_like(prefix.positions, -jnp.inf, jnp.float32)[:, None] + jnp.zeros((1, count))
    first = jnp.where(jnp.arange(count)[None] == 0, 0.0, none)
    same = jnp.zeros_like(prefix.positions)[:, None] + jnp.zeros((1, count), jnp.int32)
    state = _State(
        jnp.int32(len(forced)),
        Texts(nothing, first),
        same,
        Texts(nothing, none),
        jnp.ones_like(prefix.positions, bool),
        prefix.take(same),
    )
    ends = eos_id if model.config.ends else None
    select = partial(_select, penalty=penalty, eos_id=eos_id, steps=steps, last=ends)

    def step(state: _State) -> _State:
        last = jnp.take(state.growing.tokens, state.length - 1, axis=2)
        last = last.reshape(-1, out_sharding=out_sharding("batch"))
        return select(state._replace(prefix=state.prefix.take(state.parents).read(model, params, last)))

    return jax.lax.while_loop(lambda state: state.open.any(), step, select(state)).finished


def _select(state: _State, *, penalty, eos_id: int, steps, last: int | None) -> _State:
    """The state after one more token of every text, which is not read yet; the last may be settled."""
    b, k, _ = state.growing.tokens.shape
    logits, length = whole_rows(state.prefix.logits), state.length + 1
    size = logits.shape[-1]
    if last is not None:
        logits = jnp.where((length < steps) | (jnp.arange(size) == last)[None], logits, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    # Layouts are said, for what is reshaped from or to a single row may lose its own.
    log_probs = log_probs.reshape(b, k, size, out_sharding=out_sharding("batch", None, None))
    scores = state.growing.scores[:, :, None] + log_probs
    scores = scores.reshape(b, k * size, out_sharding=out_sharding("batch", None))
    # An end takes one token of each text, so that of 2k at least k go on.
    scores, places = jax.lax.top_k(scores, 2 * k)
    parents, new = places // size, places % size
    at = jnp.arange(state.growing.tokens.shape[-1]) == state.length
    tokens = jnp.where(at[None, None], new[:, :, None], _pick(state.growing.tokens, parents))
    ended = (new == eos_id) | (length >= steps)
    counts = ended & (jnp.arange(2 * k) < k)[None] & state.open[:, None]
    done = Texts(tokens, jnp.where(counts, scores / penalty(length), -jnp.inf))
    pairs = zip(state.finished, done, strict=True)
    finished, _ = Texts(*(jnp.concatenate(pair, axis=1) for pair in pairs)).best(k)
    growing, chosen = Texts(tokens, jnp.where(ended, -jnp.inf, scores)).best(k)
    better = growing.scores[:, 0] / penalty(length) > finished.scores.min(axis=1)
    chosen_parents = _pick(parents, chosen)
    return _State(length, growing, chosen_parents, finished, state.open & better, state.prefix)


def _pick(x: Array, places: Int[Array, "B n"]) -> Array:
    """Of each row of `x`, the entries at these places."""
    return jax.vmap(lambda row, index: row[index])(x, places)
