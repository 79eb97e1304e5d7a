"""Sampling of the next token from logits: temperature, top-k, top-p (nucleus) and min-p.

Each filter keeps the tokens above some threshold, so one sort of the vocabulary serves all three:
find the smallest kept logit, then compare. There is no gather or scatter by index, so the batch
keeps its sharding. Tokens with equal logits are kept or removed together.
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
    """Parameters of sampling. The filters apply in the order of the fields; None disables one.

    A pytree: numbers may be traced (and are then not validated), so a jitted caller does not
    recompile for another temperature.

    Attributes:
      temperature: divisor of the logits, at least 0; 0 is greedy (the first of equal tokens).
      top_k: keep the k most probable tokens, at least 1, and ties with the last of them.
      top_p: keep the smallest set of most probable tokens with mass p, in (0, 1], and ties with the
        last of them (nucleus sampling, Holtzman et al. 2020, equation 2).
      min_p: keep tokens at least min_p times as probable as the most probable one, in [0, 1]
        (Nguyen et al. 2024).

    Raises:
      InputError: a value is out of range.
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
    """Return the filtered logits, float32: -inf for removed tokens, 0 for the most probable token.

    They are divided by the temperature, and shifted so that no temperature overflows.

    Args:
      logits: (B, V), each row with a finite entry; -inf marks forbidden tokens.
      sampling: temperature and filters.
    """
    logits = whole_rows(logits).astype(jnp.float32)
    logits -= logits.max(-1, keepdims=True)
    greedy = jnp.asarray(sampling.temperature) == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    kept = jnp.where(scaled >= _lowest_kept(scaled, sampling), scaled, -jnp.inf)
    first = jnp.arange(logits.shape[-1])[None] == logits.argmax(-1, keepdims=True)
    return jnp.where(greedy, jnp.where(first, 0.0, -jnp.inf), kept)


def whole_rows(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Gather the vocabulary dimension of logits if it is sharded."""
    # Sorting needs the whole vocabulary; one row of logits per sequence is cheap to gather.
    rows, vocabulary = jax.typeof(logits).sharding.spec
    return logits if vocabulary is None else jax.sharding.reshard(logits, P(rows, None))


def _lowest_kept(logits: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B 1"]:
    """Return the smallest logit that every filter keeps; the largest logit of a row is 0."""
    if sampling.top_k is None and sampling.top_p is None:
        lowest = jnp.full_like(logits[:, :1], -jnp.inf)
    else:
        lowest = _lowest_sorted(jnp.sort(logits), sampling)
    if sampling.min_p is not None:
        lowest = jnp.maximum(lowest, jnp.log(sampling.min_p))
    return lowest


def _lowest_sorted(ascending: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B 1"]:
    """Return the smallest of ascending logits (B, V) that top-k and top-p keep."""

    def smallest(kept):
        return jnp.where(kept, ascending, 0.0).min(-1, keepdims=True)  # 0 is the maximum, always kept

    lowest = jnp.full_like(ascending[:, :1], -jnp.inf)
    if sampling.top_k is not None:
        size = ascending.shape[-1]
        lowest = smallest(jnp.arange(size)[None] >= size - sampling.top_k)
    if sampling.top_p is not None:
        # The sum starts at the least probable tokens, where float32 loses least. At p = 1 all
        # tokens stay, even those whose probability underflows.
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(ascending >= lowest, ascending, -jnp.inf)), axis=-1)
        nucleus = smallest((mass > 1 - sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1))
        lowest = jnp.maximum(lowest, nucleus)
    return lowest


def row_keys(key: Key[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return a random key for each row that depends only on `key` and the number of the row.

    The draws of a row do not depend on the size of the batch or on its index in it. For the keys of
    step t, fold t into `key` first.

    Args:
      key: the base key.
      rows: (B,), such as `jnp.arange(B)` or the number of each request.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def sample(keys: Key[Array, "B"], logits: Float[Array, "B V"], sampling: SamplingParams) -> Int[Array, "B"]:
    """Sample one token per row with the key of the row; return int32 ids (B,)."""
    logits = whole_rows(logits)
    rows = jax.typeof(logits).sharding.spec[0]
    if jax.typeof(keys).sharding.spec[0] != rows:
        keys = jax.sharding.reshard(keys, P(rows))

    def draw():
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))

    # Random numbers for the whole vocabulary cost as much as a layer: greedy decoding skips them.
    greedy = jnp.asarray(sampling.temperature) == 0
    return jax.lax.cond(greedy, lambda: logits.argmax(-1), draw).astype(jnp.int32)
