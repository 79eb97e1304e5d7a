"""Sinusoidal and learned embeddings of absolute positions."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnlab.attention.arrays import check_array, check_at_least
from attnlab.attention.positions import angles_of, frequencies
from attnlab.errors import InputError


def sinusoidal(positions: Int[Array, "B T"], width: int, halves: bool = False) -> Float[Array, "B T E"]:
    """Return the sine and cosine of position / 10000^(2i/E) of each position.

    They are interleaved (Vaswani et al. 2017, section 3.5), or, if `halves`, all sines are followed
    by all cosines (Marian).

    Raises:
      InputError: `width` is below 1, or an argument is of a wrong kind.
    """
    check_at_least(1, "sinusoidal: ", width=width)
    angles = angles_of(positions, frequencies(width))
    if halves:
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :width]


def learned(positions: Int[Array, "B T"], table: Float[Array, "P E"]) -> Float[Array, "B T E"]:
    """Return the row of the table for each position (Gehring et al. 2017, section 3.1).

    (arXiv 1705.03122.) If `positions` is traced, rows of positions outside the table are NaN.

    Raises:
      InputError: a position that is not traced is outside the table, or an argument is of a wrong
        kind.
    """
    check_array("learned: positions", positions, "integer", 2)
    check_array("learned: table", table, "floating", 2)
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    out_sharding = P(*jax.typeof(positions).sharding.spec, None) if in_mesh else None
    outside = (positions < 0) | (positions >= len(table))
    if not isinstance(positions, jax.core.Tracer) and outside.any():
        raise InputError(
            f"learned positions: the table has rows 0 to {len(table) - 1}; "
            f"got positions {positions.min()} to {positions.max()}"
        )
    inside = jnp.clip(positions, 0, len(table) - 1)
    rows = table.at[inside].get(mode="promise_in_bounds", out_sharding=out_sharding)
    return jnp.where(outside[..., None], jnp.nan, rows)
