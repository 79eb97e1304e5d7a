"""Score modifications, applied to the scaled products of queries and keys before the softmax.

Scores that depend on the distance place query i at key index i + offset, like `CausalMask`.
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
    """Base class: a shape-preserving function of the scaled scores. Its arrays get gradients.

    Attributes:
      is_additive: whether it adds a bias that does not depend on the scores.
    """

    is_additive: ClassVar[bool] = False

    def __call__(self, scores: Float[Array, "B H T S"], at: PairIndices) -> Float[Array, "B H T S"]:
        """Return the modified scores; this object's arrays are already sliced to these pairs."""
        raise NotImplementedError


@pytree
class SoftcapScore(Score):
    """cap * tanh(score / cap), within (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.cap * jnp.tanh(scores / self.cap)


@pytree
class BiasScore(Score):
    """score + bias; each dimension of the bias may be 1, and the bias gets a gradient."""

    bias: Float[Array, "B H T S"]

    is_additive = True
    dims = {"bias": ("batch", "heads", "queries", "keys")}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores + self.bias.astype(scores.dtype)


@pytree
class AlibiScore(Score):
    """score - slope * |key - query|, with one slope per head (ALiBi, arXiv 2108.12409, section 3).

    With a causal mask this is the paper's bias. Without one, the penalty is symmetric in the
    direction of the distance.
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
    """score + table[clip(key - query, -m, m) + m], with one column of the table per head.

    Attributes:
      table: bias of each distance from -m to m, (2m + 1, H).
      offset: key index of the first query.
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
    """score + by_distance[..., clip(key - query, -m, m) + m] (arXiv 1803.02155, equation 5).

    Attributes:
      by_distance: product of each query with the embedding of each distance, (B, H, T, 2m + 1).
      offset: key index of the first query.
    """

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
    """score * factor of the query; each dimension may be 1, and the factor gets a gradient."""

    factor: Float[Array, "B H T 1"]

    dims = {"factor": ("batch", "heads", "queries", None)}

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores * self.factor


@pytree
class ForgettingScore(Score):
    """score + queries - keys, running sums of the log forget gates (FoX, arXiv 2503.02130).

    The weight of a key is therefore multiplied by all gates after the key, up to the query's. Use a
    causal mask: keys after the query would be amplified. With a KV cache, the sums of the queries
    are those of the last keys.
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
    """Scores applied one after the other, in order."""

    parts: list[Score]

    @property
    def is_additive(self):
        """Whether all parts are additive."""
        return all(part.is_additive for part in self.parts)

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        for part in self.parts:
            scores = part(scores, at)
        return scores


@pytree
class ScoreFn(Score):
    """A user-defined function of one score and the indices of its pair; see `score_fn`."""

    function: TracedFn
    captured: Any

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.function(self.captured, scores, at.b, at.h, at.q, at.kv)


def score_fn(function: Callable[[Array, Array, Array, Array, Array], Array]) -> Score:
    """Return the score that maps each score to `function(score, b, h, q, k)`.

    b is the batch row, h the query head, q the query index and k the key index. The function is
    traced once with scalars. Arrays that it captures are replicated on every device and get
    gradients.

    Raises:
      InputError: the function does not return one scalar.
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
    """Return ALiBi's score, which subtracts slope * |key - query| with one slope per head.

    An int selects the paper's fixed slopes for that number of heads n: 2^(-8/n), 2^(-16/n), ... if
    n is a power of two. Otherwise they are the slopes of the next lower power of two, followed by
    every second slope of the next higher one.

    Raises:
      InputError: the number of heads is below 1.
    """
    if not isinstance(slopes, int):
        return AlibiScore(slopes, offset)
    if slopes < 1:
        raise InputError(f"alibi: the number of heads must be at least 1, not {slopes}")
    below = 1 << (slopes.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, below + 1) / below, np.arange(1, 2 * below, 2) / (2 * below)])
    return AlibiScore(jnp.asarray(2.0 ** (-8 * exponents[:slopes]), jnp.float32), offset)


def relative_bias(table: Float[Array, "distances H"], offset: Index = 0) -> Score:
    """Return the score that adds a learned bias for each clipped distance and head.

    Raises:
      InputError: the table has an even number of distances.
    """
    return RelativeBiasScore(_check_odd(table, "relative_bias"), offset)


def t5_bias(
    table: Float[Array, "buckets H"],
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    offset: Index = 0,
) -> Score:
    """Return T5's relative bias, which shares values between distances in one bucket.

    (arXiv 1910.10683, section 2.1.) Half of the buckets hold one distance each; the others grow
    logarithmically up to `max_distance`, and the last one also holds all greater distances. If
    `bidirectional`, the first half of the table is for keys at or before the query and the second
    half for keys after it; otherwise keys after the query count as distance 0. T5 does not scale
    its scores: pass `scale=1` to `attend`.

    Raises:
      InputError: too few buckets, or a `max_distance` within the exact buckets.
    """
    count = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = count // 2
    if exact < 1 or max_distance <= exact:
        least = 4 if bidirectional else 2
        raise InputError(
            f"t5_bias needs at least {least} buckets and a max_distance over its number of exact "
            f"buckets, {max(exact, 1)}; got {table.shape[0]} buckets and max_distance {max_distance}"
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
    """Return the score that adds scale * query . table[clip(key - query, -m, m) + m].

    The table holds relative position representations of the keys (Shaw et al. 2018, arXiv
    1803.02155, equations 4 and 5). Memory grows with T * (2m + 1).

    Args:
      query: the queries passed to `attend`, (B, T, H, D).
      table: embedding of each distance from -m to m, (2m + 1, D).
      scale: the scale passed to `attend`; defaults to 1 / sqrt(D).
      offset: key index of the first query.

    Raises:
      InputError: the table has an even number of distances.
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
    """Return the score that adds query . table[position], with contextual positions (CoPE).

    The position of a key is the sum of the gates from that key to the query. A gate is
    sigmoid(scale * query . key) where the mask allows the pair, else 0. Fractional positions
    interpolate between two rows of the table; positions beyond the last row use the last row (arXiv
    2405.18719). A position depends on all later keys of the row, so the bias is computed in advance
    and returned as a `BiasScore`: memory grows with T * S.

    Args:
      query: the queries passed to `attend`, (B, T, H, D).
      key: the keys passed to `attend`, (B, S, K, D).
      table: embedding of each position from 0, (P, D).
      mask: the mask passed to `attend`.
      scale: the scale passed to `attend`; defaults to 1 / sqrt(D).
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
    """Return the score that multiplies the scores of each query by its factor."""
    return TemperatureScore(factor)


def step_temperature(positions: Int[Array, "B T"], floor: int = 8192, coefficient: float = 0.1) -> Score:
    """Return the score that multiplies by 1 + coefficient * log(1 + floor((position + 1) / floor)).

    `positions` are those of the queries: attention gets sharper in steps of `floor` tokens
    (Llama 4, in its layers without rotary positions).
    """
    steps = (positions + 1) // floor
    return TemperatureScore((1 + coefficient * jnp.log1p(steps.astype(jnp.float32)))[:, None, :, None])


def log_temperature(positions: Int[Array, "B T"], scale: float | Float[Array, " H"]) -> Score:
    """Return the score that multiplies by scale * log(position + 1) of the query.

    This keeps the sharpness of attention independent of the number of keys. A scale of 1 / log(n)
    leaves the scores at length n unchanged (Chiang and Cholak 2022, arXiv 2202.12172); a learned
    scale per head is Scalable-Softmax (arXiv 2501.19399). In bidirectional attention all queries
    attend to the same number of keys, so pass the factor as the `scale` of `attend` instead.
    """
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (1, -1, 1, 1))
    return TemperatureScore(scale * jnp.log(positions.astype(jnp.float32) + 1)[:, None, :, None])


def forgetting(log_gates: Float[Array, "B T H"]) -> Score:
    """Return forgetting attention's score: the sum of the log forget gates between key and query.

    The gates are log_sigmoid of a projection of each token. Queries and keys must be the same
    sequence (T = S).
    """
    sums = jnp.cumsum(jnp.moveaxis(log_gates.astype(jnp.float32), 2, 1), axis=-1)
    return ForgettingScore(sums[:, :, :, None], sums[:, :, None, :])


def _relative_position(at: PairIndices, offset: Index) -> Int[Array, "1 1 T S"]:
    """Return key index minus query index."""
    return at.kv - at.q - offset


def _distance_index(at: PairIndices, offset: Index, distances: int) -> Int[Array, "1 1 T S"]:
    """Return the index of each pair's clipped distance; the middle of the table is distance 0."""
    max_distance = distances // 2
    return jnp.clip(_relative_position(at, offset), -max_distance, max_distance) + max_distance


def _check_odd(table: Array, name: str) -> Array:
    if table.shape[0] % 2:
        return table
    raise InputError(f"{name}: the table must have 2m + 1 rows, for distances -m to m; {len(table)} is even")


def as_score(value: Score | Callable | Sequence[Any] | None) -> Score | None:
    """Return `value` as a score: a score, a function, or a sequence of these, applied in order."""
    if value is None or isinstance(value, Score):
        return value
    if callable(value):
        return score_fn(value)
    parts = [as_score(part) for part in value]
    return ChainScore([part for part in parts if part is not None])
