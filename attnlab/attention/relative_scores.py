"""Scores of relative positions: by distance (ALiBi, T5, Shaw) or by content (CoPE).

They place query i at key index i + offset, like `CausalMask`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jaxtyping import Array, Float

from attnlab.attention.arrays import (
    check_array,
    check_at_least,
    check_index,
    check_number,
    wide,
)
from attnlab.attention.masks.base import Index, Mask, as_mask
from attnlab.attention.pairwise import pair_indices
from attnlab.attention.scores import AlibiScore, BiasScore, RelativeBiasScore, Score, ShawScore
from attnlab.errors import InputError


def alibi(slopes: int | Float[Array, " H"], offset: Index = 0) -> Score:
    """Return ALiBi's score, which subtracts slope * |key - query| with one slope per head.

    An int selects the paper's fixed slopes for that number of heads n: 2^(-8/n), 2^(-16/n), ... if
    n is a power of two. Otherwise they are the slopes of the next lower power of two, followed by
    every second slope of the next higher one.

    Raises:
      InputError: `slopes` is neither a number of heads, at least 1, nor a floating array (H,).
    """
    check_index("alibi", offset=offset)
    if isinstance(slopes, jax.Array | np.ndarray) and slopes.ndim:
        check_array("alibi: slopes", slopes, "floating", 1)
        return AlibiScore(slopes, offset)
    check_at_least(1, "alibi: the number of ", heads=slopes)
    slopes = int(slopes)
    below = 1 << (slopes.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, below + 1) / below, np.arange(1, 2 * below, 2) / (2 * below)])
    return AlibiScore(jnp.asarray(2.0 ** (-8 * exponents[:slopes]), jnp.float32), offset)


def relative_bias(table: Float[Array, "distances H"], offset: Index = 0) -> Score:
    """Return the score that adds a learned bias for each clipped distance and head.

    Raises:
      InputError: the table is not floating-point or has an even number of distances.
    """
    check_index("relative_bias", offset=offset)
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
      InputError: too few buckets, a `max_distance` within the exact buckets, or the table is not
        floating-point.
    """
    check_array("t5_bias: table", table, "floating", 2)
    check_at_least(1, "t5_bias: ", max_distance=max_distance)
    check_index("t5_bias", offset=offset)
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
      InputError: the table has an even number of distances, or an argument is of a wrong kind.
    """
    check_array("shaw: query", query, "floating", 4)
    check_index("shaw", offset=offset)
    scale = _scale("shaw", query, scale)
    table = _check_odd(table, "shaw")
    products = jnp.einsum("bthd,md->bhtm", query, table, preferred_element_type=wide(query))
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

    Raises:
      InputError: an argument is of a wrong kind.
    """
    for name, x, ndim in (("query", query, 4), ("key", key, 4), ("table", table, 2)):
        check_array(f"cope: {name}", x, "floating", ndim)
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    scale, mask = _scale("cope", query, scale), as_mask(mask)
    key = _gather_length(key)
    grouped = query.reshape(b, t, k, h // k, d)
    products = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide(query))
    allowed = mask.evaluate(pair_indices(b, h, t, s))
    products = products.reshape(b, h, t, s)
    gates = jnp.where(_shard_like(allowed, products), nn.sigmoid(scale * products), 0)
    position = jnp.minimum(lax.cumsum(gates, axis=3, reverse=True), table.shape[0] - 1)
    low = jnp.floor(position).astype(jnp.int32)
    by_position = jnp.einsum("bthd,pd->bhtp", query, table, preferred_element_type=wide(query))
    lower = jnp.take_along_axis(by_position, low, axis=-1)
    upper = jnp.take_along_axis(by_position, jnp.minimum(low + 1, table.shape[0] - 1), axis=-1)
    return BiasScore(lower + (position - low) * (upper - lower))


def _gather_length(x: Float[Array, "B S K D"]) -> Float[Array, "B S K D"]:
    """Return an array whose length is whole on every device of an Explicit mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    batch, _, heads, width = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec(batch, None, heads, width))


def _shard_like(x: Array, other: Array) -> Array:
    """Return an array sharded like another one, which it broadcasts to."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = jax.typeof(other).sharding.spec
    axes = (axis if n > 1 else None for axis, n in zip(spec, x.shape, strict=True))
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*axes))


def _scale(where: str, query: Array, scale: float | None) -> float:
    """Return the scale, 1 / sqrt(D) by default."""
    if scale is None:
        return 1 / math.sqrt(query.shape[-1])
    check_number(where, scale=scale)
    return scale


def _check_odd(table: Array, name: str) -> Array:
    check_array(f"{name}: table", table, "floating", 2)
    if table.shape[0] % 2:
        return table
    raise InputError(f"{name}: the table must have 2m + 1 rows, for distances -m to m; {len(table)} is even")
