"""How a score is changed between the scaled product and the softmax.

Those that depend on distance take query i to sit at key index i + offset, as `CausalMask` does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jaxtyping import Array, Float, Int

from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.pairwise import PairIndices, PairwiseFn, TracedFn, pair_indices, pytree
from attnlab.errors import InputError


class Score(PairwiseFn):
    """Base class: a change of the scaled scores that keeps their shape. The arrays in it get gradients.

    Attributes:
      is_additive: whether it adds to the scores what does not depend on them.
    """

    is_additive: ClassVar[bool] = False

    def __call__(self, scores: Float[Array, "B H T S"], at: PairIndices) -> Float[Array, "B H T S"]:
        """The changed scores of these pairs; the score's own arrays are cut to them, by their `dims`."""
        raise NotImplementedError


@pytree
class SoftcapScore(Score):
    """cap * tanh(score / cap): scores stay within (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.cap * jnp.tanh(scores / self.cap)


@pytree
class BiasScore(Score):
    """score + bias, an array of four dimensions of which any may be 1; the gradient reaches it."""

    bias: Float[Array, "B H T S"]

    is_additive = True
    dims = {"bias": ("batch", "heads", "queries", "keys")}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores + self.bias.astype(scores.dtype)


@pytree
class AlibiScore(Score):
    """score - slope * |key - query|, a slope for each head (ALiBi, arXiv 2108.12409, section 3).

    With a causal mask this is the paper's; without one, both directions count alike.
    """

    slopes: Float[Array, " H"]
    offset: Index = 0

    is_additive = True
    dims = {"slopes": ("heads",)}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        distance = jnp.abs(_relative_position(at, self.offset)).astype(scores.dtype)
        return scores - self.slopes[None, :, None, None] * distance


@pytree
class RelativeBiasScore(Score):
    """score + table[clip(key - query, -m, m) + m], a column for each head.

    Attributes:
      table: of every distance from m before the query to m after it, (2m + 1, H).
      offset: of the query's index.
    """

    table: Float[Array, "distances H"]
    offset: Index = 0

    is_additive = True
    dims = {"table": (None, "heads")}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        index = _distance_index(at, self.offset, self.table.shape[0])
        return scores + jnp.take(self.table.T, index[0, 0], axis=1)[None]


@pytree
class ShawScore(Score):
    """score + by_distance[clip(key - query, -m, m) + m], the query's own (arXiv 1803.02155, equation 5)."""

    by_distance: Float[Array, "B H T distances"]
    offset: Index = 0

    is_additive = True
    dims = {"by_distance": ("batch", "heads", "queries", None)}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        index = _distance_index(at, self.offset, self.by_distance.shape[-1])
        return scores + jnp.take_along_axis(self.by_distance, index, axis=-1)


@pytree
class TemperatureScore(Score):
    """score * factor of the query, an array of which any dimension may be 1; the gradient reaches it."""

    factor: Float[Array, "B H T 1"]

    dims = {"factor": ("batch", "heads", "queries", None)}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores * self.factor


@pytree
class ForgettingScore(Score):
    """score + queries - keys, running sums of the log forget gates (FoX, arXiv 2503.02130).

    A key has thus faded by every gate after it, up to the query's. It is meant for causal masks: what lies
    ahead of the query would be raised. With a cache, the sums of the queries are those of the last keys.
    """

    queries: Float[Array, "B H T 1"]
    keys: Float[Array, "B H 1 S"]

    is_additive = True
    dims = {
        "queries": ("batch", "heads", "queries", None),
        "keys": ("batch", "heads", None, "keys"),
    }

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores + (self.queries - self.keys)


@pytree
class ChainScore(Score):
    """Changes one after the other, the first first."""

    parts: list[Score]

    @property
    def is_additive(self):
        """Whether each of them only adds."""
        return all(part.is_additive for part in self.parts)

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        for part in self.parts:
            scores = part(scores, at)
        return scores


@pytree
class ScoreFn(Score):
    """A function of one score and the indices of its pair, written by the user."""

    function: TracedFn
    captured: Any

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.function(self.captured, scores, at.b, at.h, at.q, at.kv)


def score_fn(function: Callable[[Array, Array, Array, Array, Array], Array]) -> Score:
    """The change `function(score, b, h, q, k)` of the score of query q and key k, in batch row b and head h.

    It is traced once with scalars. Arrays that it captures are whole on every device, and get gradients.

    Raises:
      InputError: it does not return one scalar.
    """
    arguments = [jnp.float32(0), *[jnp.int32(0)] * 4]
    traced, captured = TracedFn.trace(function, arguments, "a score function")
    return ScoreFn(traced, captured)


def softcap(cap: float) -> Score:
    """Return the score cap * tanh(score / cap), which stays within (-cap, cap)."""
    return SoftcapScore(cap)


def bias(array: Float[Array, "..."]) -> Score:
    """Return the score that adds an array, whose gradient is computed.

    An array of fewer than four dimensions broadcasts from the right.
    """
    return BiasScore(jnp.reshape(array, (*(1,) * (4 - array.ndim), *array.shape)))


def alibi(slopes: int | Float[Array, " H"], offset: Index = 0) -> Score:
    """Return ALiBi's score, which subtracts slope * |key - query| with a slope for each head.

    A number of heads stands for the paper's slopes, which do not learn.

    They are 2^(-8/n), 2^(-16/n), ... for a power of two n. Other numbers of heads take, after those of the
    power of two below, every second one of the power above.

    Raises:
      InputError: no heads.
    """
    if not isinstance(slopes, int):
        return AlibiScore(slopes, offset)
    if slopes < 1:
        raise InputError(f"alibi takes a number of heads from 1 on, or their slopes, not {slopes}")
    below = 1 << (slopes.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, below + 1) / below, np.arange(1, 2 * below, 2) / (2 * below)])
    return AlibiScore(jnp.asarray(2.0 ** (-8 * exponents[:slopes]), jnp.float32), offset)


def relative_bias(table: Float[Array, "distances H"], offset: Index = 0) -> Score:
    """Return the score that adds a learned bias for each clipped distance and head.

    Raises:
      InputError: an even number of distances.
    """
    return RelativeBiasScore(_check_odd(table, "relative_bias"), offset)


def t5_bias(
    table: Float[Array, "buckets H"],
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    offset: Index = 0,
) -> Score:
    """Return T5's relative bias, whose distances share values in buckets (arXiv 1910.10683, section 2.1).

    Half of the buckets are for a distance each, half grow logarithmically up to max_distance, the last is
    for all beyond. If bidirectional, the first half of the table is for keys up to the query and the second
    for keys after it; else the latter count as distance 0. T5 itself leaves the scores unscaled: `scale=1`.

    Raises:
      InputError: a table or max_distance too small for such buckets.
    """
    count = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = count // 2
    if exact < 1 or max_distance <= exact:
        least = 4 if bidirectional else 2
        raise InputError(
            f"t5_bias takes at least {least} buckets, and a max_distance over that of its exact ones, "
            f"{max(exact, 1)}; got {table.shape[0]} and {max_distance}"
        )
    distance = np.arange(max_distance + 1)
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (growth * (count - exact)).astype(int), count - 1)
    before = np.where(distance < exact, distance, far)
    after = before[1:] + count if bidirectional else np.zeros(max_distance, int)
    return RelativeBiasScore(table[np.concatenate([before[::-1], after])], offset)


def shaw(
    query: Float[Array, "B T H D"],
    table: Float[Array, "distances D"],
    *,
    scale: float | None = None,
    offset: Index = 0,
) -> Score:
    """score + scale * query . table[clip(key - query, -m, m) + m]: distances have keys of their own.

    (Shaw et al. 2018, arXiv 1803.02155, equations 4 and 5.) Memory grows with T * (2m + 1).

    Args:
      query: (B, T, H, D), that `attend` gets.
      table: an embedding of each distance, (2m + 1, D).
      scale: that `attend` gets; None is 1 / sqrt(D).
      offset: of the query's index.

    Raises:
      InputError: an even number of distances.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    table = _check_odd(table, "shaw")
    products = jnp.einsum("bthd,md->bhtm", query, table, preferred_element_type=jnp.float32)
    return ShawScore(scale * products, offset)


def cope(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    table: Float[Array, "P D"],
    mask: Mask,
    *,
    scale: float | None = None,
) -> Score:
    """score + query . table[position], a key's position being the sum of gates from it on to the query.

    The gates are sigmoid(scale * query . key) where the mask allows, and 0 elsewhere. Between two positions
    of the table it is interpolated, beyond the last that is taken (CoPE, arXiv 2405.18719). As it takes
    a row's later keys to know a position, this is a `BiasScore` made beforehand: memory grows with T * S.

    Args:
      query: (B, T, H, D), that `attend` gets.
      key: (B, S, K, D), that `attend` gets.
      table: an embedding of each position from 0 on, (P, D).
      mask: that `attend` gets.
      scale: that `attend` gets; None is 1 / sqrt(D).
    """
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    grouped = query.reshape(b, t, k, h // k, d)
    products = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    allowed = mask.evaluate(pair_indices(b, h, t, s))
    gates = jnp.where(allowed, nn.sigmoid(scale * products.reshape(b, h, t, s)), 0)
    position = jnp.minimum(lax.cumsum(gates, axis=3, reverse=True), table.shape[0] - 1)
    low = jnp.floor(position).astype(jnp.int32)
    by_position = jnp.einsum("bthd,pd->bhtp", query, table, preferred_element_type=jnp.float32)
    lower = jnp.take_along_axis(by_position, low, axis=-1)
    upper = jnp.take_along_axis(by_position, jnp.minimum(low + 1, table.shape[0] - 1), axis=-1)
    return BiasScore(lower + (position - low) * (upper - lower))


def temperature(factor: Float[Array, "B H T 1"]) -> Score:
    """Return the score that multiplies by a factor of each query."""
    return TemperatureScore(factor)


def step_temperature(positions: Int[Array, "B T"], floor: int = 8192, coefficient: float = 0.1) -> Score:
    """score * (1 + coefficient * log(1 + floor((position + 1) / floor))), of the query: sharper in steps.

    (Llama 4, for its layers without rotary positions.)
    """
    steps = (positions + 1) // floor
    return TemperatureScore((1 + coefficient * jnp.log1p(steps.astype(jnp.float32)))[:, None, :, None])


def log_temperature(positions: Int[Array, "B T"], scale: float | Float[Array, " H"]) -> Score:
    """score * scale * log(position + 1), of the query: as sharp however many keys there are.

    A scale of 1 / log(n) leaves the scores at length n as they were (Chiang and Cholak 2022, arXiv
    2202.12172); of each head and learned, it is Scalable-Softmax (arXiv 2501.19399). Of bidirectional
    attention all queries see as many keys: its factor belongs in `attend`'s `scale`.
    """
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (1, -1, 1, 1))
    return TemperatureScore(scale * jnp.log(positions.astype(jnp.float32) + 1)[:, None, :, None])


def forgetting(log_gates: Float[Array, "B T H"]) -> Score:
    """Return the score of forgetting attention, which adds the log forget gates between key and query.

    There are as many queries as keys; the gates are log_sigmoid(projection of each token).
    """
    sums = jnp.cumsum(jnp.moveaxis(log_gates.astype(jnp.float32), 2, 1), axis=-1)
    return ForgettingScore(sums[:, :, :, None], sums[:, :, None, :])


def _relative_position(at: PairIndices, offset: Index) -> Int[Array, "1 1 T S"]:
    """Key index minus query index."""
    return at.kv - at.q - offset


def _distance_index(at: PairIndices, offset: Index, distances: int) -> Int[Array, "1 1 T S"]:
    """Which of so many distances each pair has, the one in the middle being 0."""
    max_distance = distances // 2
    return jnp.clip(_relative_position(at, offset), -max_distance, max_distance) + max_distance


def _check_odd(table: Array, what: str) -> Array:
    if table.shape[0] % 2:
        return table
    raise InputError(f"{what} takes a table of 2m + 1 distances, from -m to m; {len(table)} is even")


def as_score(value: Score | Callable | Sequence[Any] | None) -> Score | None:
    """Return a score as it is, or make one of a function or of several that are applied in order."""
    if value is None or isinstance(value, Score):
        return value
    if callable(value):
        return score_fn(value)
    parts = [as_score(part) for part in value]
    return ChainScore([part for part in parts if part is not None])
