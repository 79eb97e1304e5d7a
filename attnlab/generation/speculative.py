"""Speculative decoding: cheap draft tokens, verified several at a time by one pass of the model.

    last token of the model    on
    draft tokens                  the  mat  and  the
    logits of one pass         p(.|on) p(.|the) p(.|mat) p(.|and)
    accepted, plus one token      the  mat  because

Each token has the distribution of the model (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).
All rows advance together: a pass accepts as many draft tokens as the row with the fewest correct
ones, and adds one token. The gain is therefore largest for a single row.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from attnlab import sharding
from attnlab.attention.kv_cache import DecoderCache
from attnlab.errors import InputError
from attnlab.generation.decode_state import DecodeState, forward, is_eos
from attnlab.generation.sampling import SamplingParams, filter_logits, sample


@dataclass(frozen=True)
class PromptLookup:
    """Drafts that copy the text after the previous occurrence of the last n-gram.

    It needs no second model and does not change the distribution of the text.

    Attributes:
      ngram: length of the n-gram that is looked up.
      num_speculative_tokens: draft tokens per pass.
    """

    ngram: int = 2
    num_speculative_tokens: int = 4

    def __post_init__(self):
        check_num_speculative_tokens(self)
        if self.ngram < 1:
            raise InputError(f"PromptLookup.ngram is {self.ngram}; it must be at least 1")

    def propose(self, params, texts: Int[Array, "B S"], state: "SpeculativeState", sampling: SamplingParams):
        """Return num_speculative_tokens + 1 draft tokens of each row, no logits, and the texts."""
        del params, sampling
        slots, now = jnp.arange(texts.shape[1])[None], state.cache.index
        matches = (slots < now) & (slots >= self.ngram - 1)
        for i in range(self.ngram):
            matches &= jnp.roll(texts, i, axis=1) == jnp.take(texts, jnp.array([now - i]), axis=1)
        last = jnp.where(matches, slots, -1).max(axis=1, keepdims=True)
        # Beyond its end the text continues with the same period.
        places = last + 1 + jnp.arange(self.num_speculative_tokens + 1)[None] % (now - last)
        draft_tokens = jax.vmap(lambda row, at: row[at])(texts, places)
        return jnp.maximum(draft_tokens, 0).T, None, texts

    def verify(self, keys, draft_tokens: Int[Array, " B"], logits, draft_logits, sampling: SamplingParams):
        """Return the token sampled from the model, and whether it is the draft (q = 1)."""
        del draft_logits
        token = sample(keys, logits, sampling)
        return token, token == draft_tokens

    def advance(
        self, texts: Int[Array, "B S"], tokens: Int[Array, "B T"], state: "SpeculativeState", num_new
    ):
        """Return the texts with new tokens; later calls overwrite those after `num_new`."""
        del num_new
        return jax.lax.dynamic_update_slice_in_dim(texts, tokens, state.cache.index + 1, axis=1)


def check_num_speculative_tokens(speculator: Any) -> None:
    """Raise `InputError` unless a speculator drafts at least one token."""
    if speculator.num_speculative_tokens < 1:
        raise InputError(
            f"{type(speculator).__name__}.num_speculative_tokens is {speculator.num_speculative_tokens}; "
            "it must be at least 1"
        )


@dataclass(frozen=True)
class DraftSpeculator:
    """A draft model inside a compiled program; its state is the KV cache of that model."""

    model: nn.Module
    num_speculative_tokens: int

    def propose(self, params, cache: DecoderCache, state: "SpeculativeState", sampling: SamplingParams):
        """Return num_speculative_tokens + 1 draft tokens, their logits, and the cache.

        The cache contains all tokens except the last.
        """

        def one(carry: Any, _):
            cache, token, positions = carry
            new = token[:, None]
            logits, cache = forward(self.model, params, new, jnp.ones_like(new), positions[:, None], cache)
            logits = _as_rows(logits[:, 0])
            token = sample(_fold_in(state.keys, positions + 1, _DRAFT), logits, sampling)
            return (cache, token, positions + 1), (token, logits)

        start: Any = cache, state.last, state.positions
        length = self.num_speculative_tokens + 1
        (cache, *_), (draft_tokens, logits) = jax.lax.scan(one, start, length=length)
        return draft_tokens, logits, cache

    def verify(self, keys, draft_tokens: Int[Array, " B"], logits, draft_logits, sampling: SamplingParams):
        """Call `accept_or_resample`."""
        return accept_or_resample(keys, draft_tokens, logits, draft_logits, sampling)

    def advance(self, cache: DecoderCache, tokens, state: "SpeculativeState", num_new):
        """Return the cache without the rejected tokens."""
        return cache.rewind(tokens.shape[1] - num_new)


# Each random draw of a token folds its own number into the key.
_DRAFT, _ACCEPT, _RESAMPLE = 1, 2, 3


def _fold_in(keys: Key[Array, " B"], *numbers) -> Key[Array, " B"]:
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(number) else None))(keys, number)
    return keys


def accept_or_resample(
    keys: Key[Array, " B"],
    draft_tokens: Int[Array, " B"],
    logits: Float[Array, "B V"],
    draft_logits: Float[Array, "B V"],
    sampling: SamplingParams,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Return a token distributed by p from a draft token drawn from q, and whether it was accepted.

    The draft is accepted with probability min(1, p / q). Otherwise the token is drawn from
    max(0, p - q), normalised (arXiv 2211.17192, algorithm 1). The filters of `sampling` apply to
    both distributions.

    Args:
      keys: a random key per row.
      draft_tokens: tokens drawn from q.
      logits: logits of p.
      draft_logits: logits of q.
      sampling: see `SamplingParams`.
    """
    p, q = (jax.nn.softmax(filter_logits(x, sampling)) for x in (logits, draft_logits))
    at = jnp.arange(p.shape[1])[None] == draft_tokens[:, None]
    p_draft, q_draft = (jnp.where(at, x, 0.0).sum(axis=1) for x in (p, q))
    accepted = jax.vmap(jax.random.uniform)(_fold_in(keys, _ACCEPT)) * q_draft < p_draft
    resampled = jax.vmap(jax.random.categorical)(_fold_in(keys, _RESAMPLE), jnp.log(jnp.maximum(p - q, 0.0)))
    return jnp.where(accepted, draft_tokens, resampled).astype(jnp.int32), accepted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeculativeState:
    """The state between two passes.

    Attributes:
      cache: KV cache of all tokens except the last.
      last: last token of each row.
      positions: positions of the last tokens.
      keys: random key of each row.
      done: rows that have ended.
      speculator_state: texts of `PromptLookup`, or the KV cache of the draft model.
      passes: forward passes of the model so far.
    """

    cache: DecoderCache
    last: Int[Array, " B"]
    positions: Int[Array, " B"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    speculator_state: Any
    passes: Int[Array, ""]


@partial(jax.jit, static_argnames=("eos_ids", "looks_up"))
def init_speculation(
    decode_state: DecodeState,
    speculator_state: Any,
    keys: Key[Array, " B"],
    *,
    sampling: SamplingParams,
    eos_ids: tuple[int, ...],
    looks_up: bool,
) -> SpeculativeState:
    """Sample the first token of each row and return the state after it.

    Args:
      decode_state: the state after the prompts, with free cache slots for all new tokens and one
        more draft.
      speculator_state: the KV cache of the draft model or, if `looks_up`, the tokens in the slots
        of the cache.
      keys: a random key per row.
      sampling: see `SamplingParams`.
      eos_ids: the end tokens.
      looks_up: whether the speculator is a `PromptLookup`.
    """
    last = sample(_fold_in(keys, decode_state.positions), decode_state.logits, sampling)
    cache = decode_state.cache
    if looks_up:
        speculator_state = jax.lax.dynamic_update_slice_in_dim(
            speculator_state, last[:, None], cache.index, axis=1
        )
    return SpeculativeState(
        cache, last, decode_state.positions, keys, is_eos(last, eos_ids), speculator_state, jnp.int32(0)
    )


@partial(jax.jit, static_argnames=("model", "speculator", "eos_ids", "capacity"), donate_argnames="state")
def speculate(
    model: nn.Module,
    params,
    speculator: PromptLookup | DraftSpeculator,
    draft_params,
    state: SpeculativeState,
    *,
    sampling: SamplingParams,
    eos_ids: tuple[int, ...],
    capacity: int,
    limit,
) -> tuple[SpeculativeState, Int[Array, "B capacity"], Int[Array, ""]]:
    """Decode at least `limit` more tokens, unless all rows end before.

    Args:
      model: see `forward`.
      params: its parameters.
      speculator: proposes draft tokens.
      draft_params: parameters of the draft model, if there is one.
      state: the state of `init_speculation` or of the last call.
      sampling: see `SamplingParams`.
      eos_ids: the end tokens.
      capacity: length of the token array, at least `limit` and one more draft.
      limit: number of tokens after which to return; may be traced.

    Returns:
      The new state, the tokens and their number.
    """

    def one(carry):
        state, tokens, count = carry
        state, new, num_new = _draft_and_verify(
            model, params, speculator, draft_params, state, sampling, eos_ids
        )
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, new, count, axis=1), count + num_new

    tokens = jnp.zeros_like(state.last)[:, None] + jnp.zeros((1, capacity), jnp.int32)
    unfinished = lambda carry: (carry[2] < limit) & ~carry[0].done.all()  # noqa: E731
    return jax.lax.while_loop(unfinished, one, (state, tokens, jnp.int32(0)))


def _draft_and_verify(
    model, params, speculator, draft_params, state: SpeculativeState, sampling: SamplingParams, eos_ids
):
    """Return the state after one pass, its tokens (B, count + 1), and the number to keep."""
    count = speculator.num_speculative_tokens
    draft_tokens, draft_logits, speculator_state = speculator.propose(
        draft_params, state.speculator_state, state, sampling
    )
    inputs = jnp.concatenate([state.last[:, None], draft_tokens[:count].T], axis=1)
    positions = state.positions[:, None] + jnp.arange(count + 1)[None]
    logits, cache = forward(model, params, inputs, jnp.ones_like(inputs), positions, state.cache)
    logits = jnp.stack([_as_rows(logits[:, i]) for i in range(count + 1)])

    def verify(x):
        positions, draft_tokens, logits, draft_logits = x
        return speculator.verify(
            _fold_in(state.keys, positions), draft_tokens, logits, draft_logits, sampling
        )

    tokens, accepted = jax.lax.map(verify, (positions.T + 1, draft_tokens, logits, draft_logits))
    # A finished row accepts all drafts, so that it does not delay the others.
    num_accepted = jnp.where(state.done, count, jnp.cumprod(accepted[:count], axis=0).sum(axis=0))
    num_new, tokens = num_accepted.min() + 1, sharding.constrain(tokens.T, "batch", None)
    ended = (is_eos(tokens, eos_ids) & (jnp.arange(count + 1) < num_new)[None]).any(axis=1)
    new = replace(
        state,
        cache=cache.rewind(count + 1 - num_new),
        last=sharding.constrain(jnp.take(tokens, num_new - 1, axis=1), "batch"),
        positions=state.positions + num_new,
        done=state.done | ended,
        speculator_state=speculator.advance(speculator_state, tokens, state, num_new),
        passes=state.passes + 1,
    )
    return new, tokens, num_new


def _as_rows(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    return sharding.constrain(logits.astype(jnp.float32), "batch", None)
