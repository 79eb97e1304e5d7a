"""Speculative decoding: next tokens are guessed at little cost, and one pass of the model checks them all.

    the model's last token     on
    guessed                       the  mat  and  the
    one pass gives              p(.|on) p(.|the) p(.|mat) p(.|and)
    settled by it                 the  mat  because

Each token that is settled is distributed as if the model alone had written it (Leviathan et al. 2023,
arXiv 2211.17192, algorithm 1). Rows go on in step: of all rows' guesses a pass keeps as many as were right in
the row that was wrong first, and settles one token more. So the gain is greatest for a single row.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from attnlab import sharding
from attnlab.attention.cache import Cache
from attnlab.errors import InputError
from attnlab.generation.decode_state import Prefix, forward
from attnlab.generation.sampling import Sampling, filter_logits, sample

if TYPE_CHECKING:
    from attnlab.generation.generate import Generator


@dataclass(frozen=True)
class Lookup:
    """Guesses that the text repeats itself: after its last tokens comes what came after them the last time.

    Nothing but the text is needed, and what is written is what would have been written without.

    Attributes:
      ngram: how many of the last tokens are looked up.
      count: tokens guessed at a time.
    """

    ngram: int = 2
    count: int = 4

    def __post_init__(self):
        _check_count("Lookup", self.count)
        if self.ngram < 1:
            raise InputError(f"Lookup.ngram is {self.ngram}; it must be at least 1")

    def guess(self, params, texts: Int[Array, "B S"], state: "_State", sampling: Sampling):
        """`count` + 1 tokens of each row (count + 1, B); of `texts`, -1 is padding."""
        del params, sampling
        slots, now = jnp.arange(texts.shape[1])[None], state.cache.index
        found = (slots < now) & (slots >= self.ngram - 1)
        for i in range(self.ngram):
            found = found & (jnp.roll(texts, i, axis=1) == jnp.take(texts, jnp.array([now - i]), axis=1))
        last = jnp.where(found, slots, -1).max(axis=1, keepdims=True)
        # Beyond the end of the text it is taken to go on in the same period.
        places = last + 1 + jnp.arange(self.count + 1)[None] % (now - last)
        guessed = jax.vmap(lambda row, at: row[at])(texts, places)
        return jnp.maximum(guessed, 0).T, None, texts

    def settle(self, keys, guessed: Int[Array, " B"], logits, drafted, sampling: Sampling):
        """The token that the model draws, and whether it was guessed: algorithm 1 of a certain guess."""
        del drafted
        token = sample(keys, logits, sampling)
        return token, token == guessed

    def go_on(self, texts: Int[Array, "B S"], tokens: Int[Array, "B T"], state: "_State", kept):
        """The texts with new tokens; what is past those that are kept will be written over."""
        del kept
        return jax.lax.dynamic_update_slice_in_dim(texts, tokens, state.cache.index + 1, axis=1)


@dataclass(frozen=True)
class Draft:
    """Guesses what another model of the same tokens would write.

    Attributes:
      generator: of the other model.
      count: tokens guessed at a time.
    """

    generator: "Generator"
    count: int = 4

    def __post_init__(self):
        _check_count("Draft", self.count)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise InputError(f"{name}.count is {count}; it must be at least 1")


@dataclass(frozen=True)
class Drafted:
    """What a `Draft` is to a compiled program; it keeps the cache of its model."""

    model: nn.Module
    count: int

    def guess(self, params, cache: Cache, state: "_State", sampling: Sampling):
        """`count` + 1 tokens, logits that they were drawn from, and a cache with all but the last of them."""

        def one(carry: Any, _):
            cache, token, positions = carry
            new = token[:, None]
            logits, cache = forward(self.model, params, new, jnp.ones_like(new), positions[:, None], cache)
            logits = _laid_out(logits[:, 0])
            token = sample(_fold(state.keys, positions + 1, _GUESS), logits, sampling)
            return (cache, token, positions + 1), (token, logits)

        start: Any = cache, state.last, state.positions
        (cache, *_), (guessed, logits) = jax.lax.scan(one, start, length=self.count + 1)
        return guessed, logits, cache

    def settle(self, keys, guessed: Int[Array, " B"], logits, drafted, sampling: Sampling):
        """See `settle`."""
        return settle(keys, guessed, logits, drafted, sampling)

    def go_on(self, cache: Cache, tokens, state: "_State", kept):
        """The cache with the tokens that are kept."""
        return cache.rewind(tokens.shape[1] - kept)


_GUESS, _ACCEPT, _OTHER = 1, 2, 3  # what else is drawn for a token, each by a key of its own


def _fold(keys: Key[Array, " B"], *numbers) -> Key[Array, " B"]:
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(number) else None))(keys, number)
    return keys


def settle(
    keys: Key[Array, " B"],
    guessed: Int[Array, " B"],
    logits: Float[Array, "B V"],
    drafted: Float[Array, "B V"],
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """A token distributed by p, of one that was drawn from q, and whether it is the same one.

    It is kept with probability min(1, p / q), and otherwise drawn from max(0, p - q), normalised
    (arXiv 2211.17192, algorithm 1). Sampling's filters apply to both.

    Args:
      keys: of each row.
      guessed: the token drawn from q.
      logits: of p.
      drafted: logits of q.
      sampling: see `Sampling`.
    """
    p, q = (jax.nn.softmax(filter_logits(x, sampling)) for x in (logits, drafted))
    at = jnp.arange(p.shape[1])[None] == guessed[:, None]
    p_guessed, q_guessed = (jnp.where(at, x, 0.0).sum(axis=1) for x in (p, q))
    accepted = jax.vmap(jax.random.uniform)(_fold(keys, _ACCEPT)) * q_guessed < p_guessed
    other = jax.vmap(jax.random.categorical)(_fold(keys, _OTHER), jnp.log(jnp.maximum(p - q, 0.0)))
    return jnp.where(accepted, guessed, other).astype(jnp.int32), accepted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Between two passes.

    Attributes:
      cache: of all tokens but the last.
      last: token of each row.
      positions: of these.
      keys: of each row.
      done: rows that have ended.
      memo: what guesses are made of.
      passes: of the model, so far.
    """

    cache: Cache
    last: Int[Array, " B"]
    positions: Int[Array, " B"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    memo: Any
    passes: Int[Array, ""]


@partial(jax.jit, static_argnames=("eos_id", "looks_up"))
def begin(
    prefix: Prefix, memo: Any, keys: Key[Array, " B"], *, sampling: Sampling, eos_id: int, looks_up: bool
) -> _State:
    """The state once the first token is drawn: `last`, to be taken for the first that is written.

    Args:
      prefix: what was read, with free slots for all tokens that will be written, and one guess more.
      memo: the cache of the drafting model; or, if that `looks_up`, the texts by slots of the cache.
      keys: of each row.
      sampling: how tokens are drawn.
      eos_id: the token that ends a text.
      looks_up: whether guesses are looked up.
    """
    last = sample(_fold(keys, prefix.positions), prefix.logits, sampling)
    if looks_up:
        memo = jax.lax.dynamic_update_slice_in_dim(memo, last[:, None], prefix.cache.index, axis=1)
    return _State(prefix.cache, last, prefix.positions, keys, last == eos_id, memo, jnp.int32(0))


@partial(jax.jit, static_argnames=("model", "guesser", "eos_id", "room"), donate_argnames="state")
def speculate(
    model: nn.Module, params, guesser: Lookup | Drafted, guesser_params, state: _State, *,
    sampling: Sampling, eos_id: int, room: int, limit,
) -> tuple[_State, Int[Array, "B room"], Int[Array, ""]]:  # fmt: skip
    """The next tokens of every row, at least `limit` unless all end, and how many there are.

    Args:
      model: see `forward`.
      params: its parameters.
      guesser: what guesses.
      guesser_params: parameters of its model, if it has one.
      state: of `begin`, or of the last call.
      sampling: how tokens are drawn.
      eos_id: the token that ends a text.
      room: for tokens, at least `limit` and one guess more.
      limit: tokens after which to return; may be traced.
    """

    def one(carry):
        state, tokens, number = carry
        state, new, kept = _pass(model, params, guesser, guesser_params, state, sampling, eos_id)
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, new, number, axis=1), number + kept

    nothing = jnp.zeros_like(state.last)[:, None] + jnp.zeros((1, room), jnp.int32)
    goes_on = lambda carry: (carry[2] < limit) & ~carry[0].done.all()  # noqa: E731
    return jax.lax.while_loop(goes_on, one, (state, nothing, jnp.int32(0)))


def _pass(model, params, guesser, guesser_params, state: _State, sampling: Sampling, eos_id: int):
    """The state after one pass, the tokens that it settles in (B, count + 1), and how many they are."""
    count = guesser.count
    guessed, drafted, memo = guesser.guess(guesser_params, state.memo, state, sampling)
    given = jnp.concatenate([state.last[:, None], guessed[:count].T], axis=1)
    positions = state.positions[:, None] + jnp.arange(count + 1)[None]
    logits, cache = forward(model, params, given, jnp.ones_like(given), positions, state.cache)
    logits = jnp.stack([_laid_out(logits[:, i]) for i in range(count + 1)])

    def settle_one(x):
        positions, guessed, logits, drafted = x
        return guesser.settle(_fold(state.keys, positions), guessed, logits, drafted, sampling)

    tokens, right = jax.lax.map(settle_one, (positions.T + 1, guessed, logits, drafted))
    # A row that has ended holds up no other.
    stretch = jnp.where(state.done, count, jnp.cumprod(right[:count], axis=0).sum(axis=0))
    kept, tokens = stretch.min() + 1, sharding.constrain(tokens.T, "batch", None)
    ended = ((tokens == eos_id) & (jnp.arange(count + 1) < kept)[None]).any(axis=1)
    new = replace(
        state,
        cache=cache.rewind(count + 1 - kept),
        last=sharding.constrain(jnp.take(tokens, kept - 1, axis=1), "batch"),
        positions=state.positions + kept,
        done=state.done | ended,
        memo=guesser.go_on(memo, tokens, state, kept),
        passes=state.passes + 1,
    )
    return new, tokens, kept


def _laid_out(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    return sharding.constrain(logits.astype(jnp.float32), "batch", None)
