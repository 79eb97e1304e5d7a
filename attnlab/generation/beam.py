"""Beam search: the most probable continuations, keeping the best few of each length."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.errors import InputError
from attnlab.generation.decode_state import DecodeState, is_eos
from attnlab.generation.sampling import whole_rows
from attnlab.sharding import out_sharding


@dataclass(frozen=True)
class PowerLengthPenalty:
    """|Y|^alpha; alpha > 0 prefers longer texts, and 1 compares mean log-probabilities."""

    alpha: float = 1.0

    def __post_init__(self):
        _require_finite(self)

    def __call__(self, length: Int[Array, ""]) -> Float[Array, ""]:
        """Return the divisor of the log-probability of a text of this length."""
        return length.astype(jnp.float32) ** self.alpha


@dataclass(frozen=True)
class GNMTLengthPenalty:
    """((5 + |Y|) / 6)^alpha (Wu et al. 2016, arXiv 1609.08144, equation 14)."""

    alpha: float = 0.6

    def __post_init__(self):
        _require_finite(self)

    def __call__(self, length: Int[Array, ""]) -> Float[Array, ""]:
        """Return the divisor of the log-probability of a text of this length."""
        return ((5 + length.astype(jnp.float32)) / 6) ** self.alpha


LengthPenalty: TypeAlias = PowerLengthPenalty | GNMTLengthPenalty


def _require_finite(penalty: PowerLengthPenalty | GNMTLengthPenalty) -> None:
    if not math.isfinite(penalty.alpha):
        raise InputError(f"{type(penalty).__name__}.alpha is {penalty.alpha}; it must be a finite number")


@dataclass(frozen=True)
class BeamSearchOptions:
    """Options of a beam search.

    Attributes:
      num_beams: number k of hypotheses at each length.
      length_penalty: divisor of log-probabilities, to compare texts of different lengths.
    """

    num_beams: int = 4
    length_penalty: LengthPenalty = PowerLengthPenalty()

    def __post_init__(self):
        if self.num_beams < 1:
            raise InputError(f"BeamSearchOptions.num_beams is {self.num_beams}; it must be at least 1")


class Hypotheses(NamedTuple):
    """The k best hypotheses of each row, best first. The end token is the padding.

    The score of a live hypothesis is its log-probability. The score of a finished hypothesis is its
    log-probability divided by the length penalty. The score of an empty place is -inf.
    """

    tokens: Int[Array, "B k T"]
    scores: Float[Array, "B k"]

    def best(self, count: int) -> tuple["Hypotheses", Int[Array, "B count"]]:
        """Return the `count` best hypotheses and their indices."""
        scores, places = jax.lax.top_k(self.scores, count)
        return Hypotheses(_pick(self.tokens, places), scores), places


class _BeamState(NamedTuple):
    """The state between two tokens.

    Attributes:
      length: number of tokens of every live hypothesis.
      live: hypotheses that have not ended.
      parents: index of the previous hypothesis that each live one extends. The cache still has the
        order of the previous hypotheses.
      finished: hypotheses that have ended.
      active: whether a row can still find a better hypothesis.
      decode_state: cache and logits, B * k rows.
    """

    length: Int[Array, ""]
    live: Hypotheses
    parents: Int[Array, "B k"]
    finished: Hypotheses
    active: Bool[Array, " B"]
    decode_state: DecodeState


@partial(
    jax.jit,
    static_argnames=("model", "num_beams", "length_penalty", "slots", "eos_ids", "forced_decoder_ids"),
)
def beam_search(
    model,
    params,
    decode_state: DecodeState,
    *,
    num_beams: int,
    length_penalty: LengthPenalty,
    eos_ids: tuple[int, ...],
    slots: int,
    steps,
    forced_decoder_ids: tuple[int, ...] = (),
) -> Hypotheses:
    """Search the `num_beams` best hypotheses of each row.

    Each step extends every live hypothesis by every token and selects the (1 + n) k most probable
    ones, for n end tokens. Those among the first k that end, by an end token or by their length,
    compete for the k finished places; the k most probable of the others stay live. With
    `generation.forced_eos` the last token is the first end token. A row is done when all finished
    places are taken and its best live hypothesis, scored as if it ended now, is not better than its
    worst finished one. (With a penalty over 1 a later end could still score higher; this is
    early_stopping=False of Hugging Face's generate.)

    Args:
      model: a decoder; see `forward`.
      params: its parameters.
      decode_state: the state after the prompts, with at least `steps` - 1 free cache slots.
      num_beams: k.
      length_penalty: see `BeamSearchOptions`.
      eos_ids: the end tokens; the first is also used as padding.
      slots: T, the length of the token arrays.
      steps: maximum number of tokens, at most `slots`; may be traced.
      forced_decoder_ids: the first tokens of every text, fewer than `steps`, already in
        `decode_state`.

    Returns:
      The hypotheses with their scores, best first.
    """
    # Every hypothesis begins with the forced tokens and is padded with the end token.
    initial = jnp.array([*forced_decoder_ids, *[eos_ids[0]] * (slots - len(forced_decoder_ids))], jnp.int32)
    tokens = jnp.zeros_like(decode_state.positions)[:, None, None] + jnp.tile(initial, (1, num_beams, 1))
    empty = jnp.full_like(decode_state.positions, -jnp.inf, jnp.float32)[:, None] + jnp.zeros((1, num_beams))
    only_first = jnp.where(jnp.arange(num_beams)[None] == 0, 0.0, empty)
    parents = jnp.zeros_like(decode_state.positions)[:, None] + jnp.zeros((1, num_beams), jnp.int32)
    state = _BeamState(
        jnp.int32(len(forced_decoder_ids)),
        Hypotheses(tokens, only_first),
        parents,
        Hypotheses(tokens, empty),
        jnp.ones_like(decode_state.positions, bool),
        decode_state.take(parents),
    )
    last_token = eos_ids[0] if model.config.generation.forced_eos else None
    select = partial(
        _select, length_penalty=length_penalty, eos_ids=eos_ids, steps=steps, last_token=last_token
    )

    def step(state: _BeamState) -> _BeamState:
        token = jnp.take(state.live.tokens, state.length - 1, axis=2)
        token = token.reshape(-1, out_sharding=out_sharding("batch"))
        decode_state = state.decode_state.take(state.parents).decode(model, params, token)
        return select(state._replace(decode_state=decode_state))

    return jax.lax.while_loop(lambda state: state.active.any(), step, select(state)).finished


def _select(
    state: _BeamState,
    *,
    length_penalty: LengthPenalty,
    eos_ids: tuple[int, ...],
    steps,
    last_token: int | None,
) -> _BeamState:
    """Extend every live hypothesis by one token, which is not in the cache yet.

    If `last_token` is given, every hypothesis of maximum length ends with it.
    """
    b, k, _ = state.live.tokens.shape
    logits, length = whole_rows(state.decode_state.logits), state.length + 1
    vocab_size = logits.shape[-1]
    if last_token is not None:
        logits = jnp.where((length < steps) | (jnp.arange(vocab_size) == last_token)[None], logits, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    # Shardings are explicit: an array reshaped from or to a single row may lose its own.
    log_probs = log_probs.reshape(b, k, vocab_size, out_sharding=out_sharding("batch", None, None))
    scores = state.live.scores[:, :, None] + log_probs
    scores = scores.reshape(b, k * vocab_size, out_sharding=out_sharding("batch", None))
    # Each hypothesis has one extension by each end token, so at least k of these stay live.
    count = (1 + len(eos_ids)) * k
    scores, places = jax.lax.top_k(scores, count)
    parents, new = places // vocab_size, places % vocab_size
    at = jnp.arange(state.live.tokens.shape[-1]) == state.length
    tokens = jnp.where(at[None, None], new[:, :, None], _pick(state.live.tokens, parents))
    ended = is_eos(new, eos_ids) | (length >= steps)
    can_finish = ended & (jnp.arange(count) < k)[None] & state.active[:, None]
    candidates = Hypotheses(tokens, jnp.where(can_finish, scores / length_penalty(length), -jnp.inf))
    pairs = zip(state.finished, candidates, strict=True)
    finished, _ = Hypotheses(*(jnp.concatenate(pair, axis=1) for pair in pairs)).best(k)
    live, chosen = Hypotheses(tokens, jnp.where(ended, -jnp.inf, scores)).best(k)
    better = live.scores[:, 0] / length_penalty(length) > finished.scores.min(axis=1)
    chosen_parents = _pick(parents, chosen)
    return _BeamState(length, live, chosen_parents, finished, state.active & better, state.decode_state)


def _pick(x: Array, places: Int[Array, "B n"]) -> Array:
    """Return the entries of each row of `x` at these places."""
    return jax.vmap(lambda row, index: row[index])(x, places)
