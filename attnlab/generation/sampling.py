"""From logits to the next token: temperature, top-k, nucleus and min-p.

Each filter keeps the tokens above some level, so one sort of the vocabulary serves all three:
find the smallest logit that stays, then compare. Nothing is gathered by index or scattered back,
so a batch stays sharded as it came. Two tokens with the same logit share their fate, whatever
their ids.
"""

import math
from dataclasses import dataclass
from numbers import Real

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from attnlab.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token; the filters apply in the order of the fields, each to what the last one left.

    temperature: divides the logits, at least 0; 0 draws the most probable token (the first, of equals).
    top_k: keep the k most probable tokens, at least 1, and all that equal the last of them.
    top_p: keep the smallest set of most probable tokens whose mass reaches p, in (0, 1]
        (nucleus sampling, Holtzman et al. 2020, equation 2), and all that equal the last of them.
    min_p: keep what is at least min_p times as probable as the most probable token, in [0, 1]
        (Nguyen et al. 2024).

    None leaves a filter out. A pytree: numbers may be traced (and are then not validated), so a
    jitted caller does not compile again for another temperature. Errors: `InputError`.
    """

    temperature: float | Float[Array, ""] = 1.0
    top_k: int | Int[Array, ""] | None = None
    top_p: float | Float[Array, ""] | None = None
    min_p: float | Float[Array, ""] | None = None

    def __post_init__(self):
        _require("temperature", self.temperature, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
        _require("top_k", self.top_k, lambda x: x >= 1 and x == int(x), "a whole number, 1 or more, or None")
        _require("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1], or None")
        _require("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1], or None")


def _require(name, value, allowed, meaning):
    if isinstance(value, Real) and not allowed(value):
        raise InputError(f"SamplingParams.{name} is {value!r}; it must be {meaning}")


def filter_logits(logits: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B V"]:
    """Logits of the distribution to draw from: -inf where nothing may be drawn, 0 at the most probable token.

    logits (B, V), each row with a finite entry; -inf marks tokens that are forbidden already.
    Returns float32, scaled by the temperature, and shifted so that no temperature overflows.
    """
    logits = whole_rows(logits).astype(jnp.float32)
    logits -= logits.max(-1, keepdims=True)
    greedy = jnp.asarray(sampling.temperature) == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    kept = jnp.where(scaled >= _lowest_kept(scaled, sampling), scaled, -jnp.inf)
    first = jnp.arange(logits.shape[-1])[None] == logits.argmax(-1, keepdims=True)
    return jnp.where(greedy, jnp.where(first, 0.0, -jnp.inf), kept)


def whole_rows(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits whose vocabulary is in one place."""
    # Sorting needs the vocabulary in one place; one row of logits per sequence is cheap to gather.
    rows, vocabulary = jax.typeof(logits).sharding.spec
    return logits if vocabulary is None else jax.sharding.reshard(logits, P(rows, None))


def _lowest_kept(logits: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B 1"]:
    """The smallest logit that every filter keeps; the largest logit of a row is 0."""
    if sampling.top_k is None and sampling.top_p is None:
        lowest = jnp.full_like(logits[:, :1], -jnp.inf)
    else:
        lowest = _lowest_sorted(jnp.sort(logits), sampling)
    if sampling.min_p is not None:
        lowest = jnp.maximum(lowest, jnp.log(sampling.min_p))
    return lowest


def _lowest_sorted(ascending: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B 1"]:
    """The smallest of ascending logits (B, V) that top-k and top-p keep."""

    def smallest(kept):
        return jnp.where(kept, ascending, 0.0).min(-1, keepdims=True)  # 0 is the greatest: it always stays

    lowest = jnp.full_like(ascending[:, :1], -jnp.inf)
    if sampling.top_k is not None:
        size = ascending.shape[-1]
        lowest = smallest(jnp.arange(size)[None] >= size - sampling.top_k)
    if sampling.top_p is not None:
        # Mass is summed from the improbable end, where float32 loses least. At p = 1 everything stays,
        # even a token whose probability is too small for a float.
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(ascending >= lowest, ascending, -jnp.inf)), axis=-1)
        nucleus = smallest((mass > 1 - sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1))
        lowest = jnp.maximum(lowest, nucleus)
    return lowest


def row_keys(key: Key[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """A random key for each row, made from the row's own number alone.

    rows (B,): for instance `jnp.arange(B)`, or the number of each request. What a row draws then
    does not depend on how many others share its batch, nor on its place among them. For the keys
    of step t, fold t into `key` first.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def sample(keys: Key[Array, "B"], logits: Float[Array, "B V"], sampling: SamplingParams) -> Int[Array, "B"]:
    """Draw one token for each row, by the row's own key; keys (B,), logits (B, V), returns int32 ids (B,)."""
    logits = whole_rows(logits)
    rows = jax.typeof(logits).sharding.spec[0]
    if jax.typeof(keys).sharding.spec[0] != rows:
        keys = jax.sharding.reshard(keys, P(rows))

    def draw():
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))

    # A random number for each token of the vocabulary costs as much as a layer: not where none is drawn.
    greedy = jnp.asarray(sampling.temperature) == 0
    return jax.lax.cond(greedy, lambda: logits.argmax(-1), draw).astype(jnp.int32)
