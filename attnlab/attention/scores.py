"""Score modifications, applied to the scaled products of queries and keys before the softmax.

Scores that depend on the distance place query i at key index i + offset, like `CausalMask`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.arrays import (
    check_array,
    check_at_least,
    check_function,
    check_number,
    describe,
    is_array,
    wide,
)
from attnlab.attention.masks.base import Index
from attnlab.attention.pairwise import PairIndices, PairwiseFn, pytree, static
from attnlab.attention.traced_fn import TracedFn
from attnlab.errors import InputError


class Score(PairwiseFn):
    """Base class: a shape-preserving function of the scaled scores. Its arrays get gradients.

    Attributes:
      is_additive: whether it adds a bias that does not depend on the scores.
      mixes_heads: whether the score of a head depends on those of other heads.
    """

    is_additive: ClassVar[bool] = False
    mixes_heads: ClassVar[bool] = False

    def __call__(self, scores: Float[Array, "B H T S"], at: PairIndices) -> Float[Array, "B H T S"]:
        """Return the modified scores; this object's arrays are already sliced to these pairs."""
        raise NotImplementedError


@pytree
class SoftcapScore(Score):
    """cap * tanh(score / cap), within (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float = static()

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return self.cap * jnp.tanh(scores / self.cap)


@pytree
class LearnedSoftcapScore(Score):
    """`SoftcapScore` whose cap is an array, which gets a gradient."""

    cap: Float[Array, ""]

    __call__ = SoftcapScore.__call__


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
class BidirectionalForgettingScore(ForgettingScore):
    """`ForgettingScore` in which the gates between a query and a later key count as well."""

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return scores - jnp.abs(self.queries - self.keys)


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

    function: TracedFn = static()
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
      InputError: the function does not take a score and four indices, or does not return one
        floating-point number.
    """
    if not callable(function):
        raise InputError(f"score_fn takes a function of (score, b, h, q, k), not {describe(function)}")
    check_function(function, "a score function", "score, b, h, q, k")
    arguments = [jnp.float32(0), *[jnp.int32(0)] * 4]
    traced, captured = TracedFn.trace(function, arguments, "a score function", jnp.floating)
    return ScoreFn(traced, captured)


def softcap(cap: float | Float[Array, ""]) -> Score:
    """Return the score cap * tanh(score / cap), which stays within (-cap, cap).

    Raises:
      InputError: `cap` is not a finite number above 0.
    """
    check_number("softcap", 0, cap=cap)
    return SoftcapScore(cap) if isinstance(cap, int | float) else LearnedSoftcapScore(cap)


def bias(array: Float[Array, "..."]) -> Score:
    """Return the score that adds an array, whose gradient is computed.

    An array of fewer than four dimensions broadcasts from the right.

    Raises:
      InputError: `array` is not a floating-point array of at most 4 dimensions.
    """
    hint = "pass a boolean array as mask=, and convert integers with .astype(jnp.float32)"
    check_array("bias: array", array, "floating", range(5), hint)
    return BiasScore(jnp.reshape(array, (*(1,) * (4 - array.ndim), *array.shape)))


def temperature(factor: Float[Array, "B H T 1"]) -> Score:
    """Return the score that multiplies the scores of each query by its factor.

    Raises:
      InputError: `factor` is not a floating-point array of 4 dimensions; a number is `scale=`.
    """
    check_array("temperature: factor", factor, "floating", 4)
    return TemperatureScore(factor)


def step_temperature(positions: Int[Array, "B T"], floor: int = 8192, coefficient: float = 0.1) -> Score:
    """Return the score that multiplies by 1 + coefficient * log(1 + floor((position + 1) / floor)).

    `positions` are those of the queries: attention gets sharper in steps of `floor` tokens
    (Llama 4, in its layers without rotary positions).

    Raises:
      InputError: `positions` is not an integer array (B, T), `floor` is below 1, or `coefficient`
        is not finite.
    """
    check_array("step_temperature: positions", positions, "integer", 2)
    check_at_least(1, "step_temperature: ", floor=floor)
    check_number("step_temperature", coefficient=coefficient)
    steps = (positions + 1) // floor
    return TemperatureScore((1 + coefficient * jnp.log1p(steps.astype(jnp.float32)))[:, None, :, None])


def log_temperature(positions: Int[Array, "B T"], scale: float | Float[Array, " H"]) -> Score:
    """Return the score that multiplies by scale * log(position + 1) of the query.

    This keeps the sharpness of attention independent of the number of keys. A scale of 1 / log(n)
    leaves the scores at length n unchanged (Chiang and Cholak 2022, arXiv 2202.12172); a learned
    scale per head is Scalable-Softmax (arXiv 2501.19399). In bidirectional attention all queries
    attend to the same number of keys, so pass the factor as the `scale` of `attend` instead.

    Raises:
      InputError: `positions` is not an integer array (B, T), or `scale` is not finite.
    """
    check_array("log_temperature: positions", positions, "integer", 2)
    if is_array(scale) and jnp.ndim(scale):
        check_array("log_temperature: scale", scale, "floating", 1)
    else:
        check_number("log_temperature", scale=scale)
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (1, -1, 1, 1))
    return TemperatureScore(scale * jnp.log(positions.astype(jnp.float32) + 1)[:, None, :, None])


def forgetting(log_gates: Float[Array, "B T H"]) -> Score:
    """Return forgetting attention's score: the sum of the log forget gates between key and query.

    The gates are log_sigmoid of a projection of each token. Queries and keys must be the same
    sequence (T = S).

    Raises:
      InputError: `log_gates` is not a floating-point array (B, T, H).
    """
    check_array("forgetting: log_gates", log_gates, "floating", 3)
    sums = jnp.cumsum(jnp.moveaxis(log_gates.astype(wide(log_gates)), 2, 1), axis=-1)
    return ForgettingScore(sums[:, :, :, None], sums[:, :, None, :])


def _relative_position(at: PairIndices, offset: Index) -> Int[Array, "1 1 T S"]:
    """Return key index minus query index."""
    return at.kv - at.q - offset


def _distance_index(at: PairIndices, offset: Index, distances: int) -> Int[Array, "1 1 T S"]:
    """Return the index of each pair's clipped distance; the middle of the table is distance 0."""
    max_distance = distances // 2
    return jnp.clip(_relative_position(at, offset), -max_distance, max_distance) + max_distance


def as_score(value: Score | Callable | Sequence[Any] | None) -> Score | None:
    """Return `value` as a score: a score, a function, or a sequence of these, applied in order.

    Raises:
      InputError: `value` is anything else, such as an array or a mask.
    """
    if value is None or isinstance(value, Score):
        return value
    if isinstance(value, PairwiseFn):
        raise InputError(f"a score is needed, and {type(value).__name__} is a mask: pass it as mask=")
    if callable(value):
        return score_fn(value)
    if not isinstance(value, list | tuple):
        hint = "; wrap an array in bias(array)" if is_array(value) else ""
        raise InputError(
            f"a score must be a Score, a function, or a list of these, not {describe(value)}{hint}"
        )
    parts = [part for part in map(as_score, value) if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return ChainScore(parts)
