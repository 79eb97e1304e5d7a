"""Where a token stands: rotary, sinusoidal and learned positions as functions of arrays.

A rotary position turns each pair of a head's numbers by an angle, position * frequency. `rotate` turns, and
the others say by what angles: `rotary` by one position, `axial` and `multimodal` by several. How the
frequencies are stretched for lengths beyond those trained on is a `Scaling`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError


def frequencies(width: int, theta: float = 10_000.0) -> Float[Array, " pairs"]:
    """theta^(-2i/width) of each pair i, radians a token (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


@dataclass(frozen=True)
class Scaling:
    """Base class, and no scaling at all: what becomes of frequencies, and of the size of queries and keys."""

    @property
    def attention_factor(self) -> float:
        """Factor of queries and keys alike, so that the scores grow by its square."""
        return 1.0

    def __call__(self, width: int, theta: float, positions: Int[Array, "b T"]) -> Float[Array, " pairs"]:
        """The frequency of each pair of a rotary width, for tokens at these positions."""
        return frequencies(width, theta)


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Positions divided by the factor (position interpolation, arXiv 2306.15595, section 2.3)."""

    factor: float

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        return frequencies(width, theta) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """A theta so much greater that the last pair is slowed by the factor (arXiv 2309.00071, section 3.1)."""

    factor: float

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        return _ntk(width, theta, self.factor)


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """`NTK` by as much as the greatest position exceeds the original length (arXiv 2309.00071, section 3.3).

    Keys in a cache stay as they were turned at the length when they came.

    Attributes:
      factor: of the excess; with 1, `NTK`'s factor is the length over the original one.
      original: length trained on, tokens.
    """

    factor: float
    original: int

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        excess = jnp.maximum((positions.max() + 1) / self.original - 1, 0)
        return _ntk(width, theta, 1 + self.factor * excess)


@dataclass(frozen=True)
class YaRN(Scaling):
    """Pairs that turn rarely are slowed by the factor, others not (arXiv 2309.00071, section 3).

    Attributes:
      factor: by which length grows.
      original: length trained on, tokens.
      fast: turns over the original length from which on a pair stays as it is.
      slow: turns up to which it is slowed fully.
      truncate: the ramp between starts and ends at whole pairs.
      temperature: the attention factor; None is 0.1 log(factor) + 1 (section 3.4).
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    temperature: float | None = None

    @property
    def attention_factor(self):
        """See `Scaling.attention_factor`."""
        return 0.1 * math.log(max(self.factor, 1)) + 1 if self.temperature is None else self.temperature

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""

        def pair(turns: float) -> float:
            """Which pair turns so often: original * theta^(-2i/width) = 2 pi turns, solved for i."""
            return width * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))

        # The ramp between them is linear in the pair, as in the authors' code, and not in its turns.
        first, last = pair(self.fast), pair(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        slowed = np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
        return _interpolate(frequencies(width, theta), self.factor, jnp.asarray(slowed, jnp.float32))


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """Each pair slowed by a factor of its own, found by search (arXiv 2402.13753, section 3).

    Attributes:
      short: factor of each pair in sequences up to the original length.
      long: factor of each pair in longer ones.
      original: length trained on, tokens.
      factor: by which length grows; it gives the attention factor sqrt(1 + log(factor) / log(original)).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float

    @property
    def attention_factor(self):
        """See `Scaling.attention_factor`."""
        return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original))

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`.

        Raises:
          InputError: not one factor for each pair.
        """
        if {len(self.short), len(self.long)} != {width // 2}:
            raise InputError(
                f"LongRoPE: a rotary width of {width} takes {width // 2} short and long factors each; "
                f"got {len(self.short)} and {len(self.long)}"
            )
        short, long = (jnp.asarray(x, jnp.float32) for x in (self.short, self.long))
        return frequencies(width, theta) / jnp.where(positions.max() >= self.original, long, short)


@dataclass(frozen=True)
class Llama3(Scaling):
    """As `YaRN`, but by a ramp in the number of turns and with no attention factor (Llama 3.1).

    Attributes:
      factor: by which length grows.
      original: length trained on, tokens.
      slow: turns over the original length up to which a pair is slowed fully.
      fast: turns from which on it stays as it is.
    """

    factor: float = 8.0
    original: int = 8192
    slow: float = 1.0
    fast: float = 4.0

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        plain = frequencies(width, theta)
        turns = self.original / (2 * math.pi) * plain
        return _interpolate(plain, self.factor, jnp.clip((self.fast - turns) / (self.fast - self.slow), 0, 1))


def _ntk(width: int, theta: float, factor: float | Array) -> Array:
    # (theta * factor^(width / (width - 2)))^(-2i/width), of which the last pair has 1 / factor.
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / max(width - 2, 1)
    return frequencies(width, theta) * factor**-exponents


def _interpolate(plain: Array, factor: float, slowed: Array) -> Array:
    """Frequencies divided by the factor where slowed is 1, as they were where it is 0, and between."""
    return plain / factor * slowed + plain * (1 - slowed)


def rotate(
    x: Float[Array, "B T H D"],
    angles: Float[Array, "b T pairs"],
    *,
    factor: float | Float[Array, "b T pairs"] = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """Turns the first pairs of each head's numbers by these angles, times a factor; the others stay.

    Of P pairs, the i-th is numbers (i, i + P), or (2i, 2i + 1) if interleaved: two orders of one thing, of
    which RoFormer (arXiv 2104.09864, equation 34) has the latter and most models the former.

    Args:
      x: queries or keys, (B, T, H, D).
      angles: of each token and pair, in radians, (B, T, P) or (1, T, P).
      factor: of the size of each pair.
      interleaved: whether the numbers of a pair stand side by side.

    Raises:
      InputError: more pairs than a head has.
    """
    width = 2 * angles.shape[-1]
    if width > x.shape[-1]:
        raise InputError(f"{width // 2} pairs to turn need a head_dim of {width}; it is {x.shape[-1]}")
    cos, sin = ((factor * f(angles))[:, :, None, :] for f in (jnp.cos, jnp.sin))
    rotated, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
    else:
        a, b = jnp.split(rotated, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = jnp.stack([a, b], -1).reshape(rotated.shape) if interleaved else jnp.concatenate([a, b], -1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def rotary(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "b T"],
    *,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    scaling: Scaling | None = None,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """Turns pair i of each head by position * theta^(-2i/D'), over the first D' = fraction * D of its width.

    (RoFormer, arXiv 2104.09864, equation 34.)

    Args:
      x: queries or keys, (B, T, H, D).
      positions: of each token, (B, T) or (1, T).
      theta: base of the frequencies.
      fraction: share of the width that is turned.
      scaling: what becomes of the frequencies; None is nothing.
      interleaved: see `rotate`.
    """
    scaling = scaling or Scaling()
    speeds = scaling(int(x.shape[-1] * fraction) // 2 * 2, theta, positions)
    angles = _angles(positions, speeds)
    return rotate(x, angles, factor=scaling.attention_factor, interleaved=interleaved)


def axial(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "b T axes"],
    *,
    theta: float = 10_000.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """`rotary` on a grid: each axis turns an equal run of the pairs by frequencies of its own.

    On two axes, the row turns the first half of the pairs and the column the second (vision transformers:
    RoPE-ViT, arXiv 2403.13298; Qwen2-VL, arXiv 2409.12191).

    Args:
      x: queries or keys, (B, T, H, D).
      positions: of each token along each axis, as (row, column), (B, T, axes) or (1, T, axes).
      theta: base of the frequencies.
      interleaved: see `rotate`.

    Raises:
      InputError: D pairs that do not divide among the axes.
    """
    axes, width = positions.shape[-1], x.shape[-1]
    if width % (2 * axes):
        raise InputError(f"axial: {axes} axes take a head_dim that {2 * axes} divides; it is {width}")
    speeds = frequencies(width // axes, theta)
    return rotate(x, _axis_angles(positions, [speeds] * axes), interleaved=interleaved)


def multimodal(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "b T axes"],
    sections: tuple[int, ...],
    *,
    theta: float = 10_000.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """`rotary` whose pairs follow several positions: one spectrum, of which each axis turns a section.

    So text, whose token has the same position along all axes, is turned as by `rotary` (M-RoPE: Qwen2-VL,
    arXiv 2409.12191, section 2.1).

    Args:
      x: queries or keys, (B, T, H, D).
      positions: of each token along each axis, as (time, row, column), (B, T, axes) or (1, T, axes).
      sections: how many pairs follow each axis, from the fastest on; in Qwen2-VL, (16, 24, 24) of 64.
      theta: base of the frequencies.
      interleaved: see `rotate`.

    Raises:
      InputError: not a section for each axis, or more pairs than a head has.
    """
    if len(sections) != positions.shape[-1]:
        raise InputError(f"multimodal: {len(sections)} sections for {positions.shape[-1]} axes of positions")
    speeds = jnp.split(frequencies(2 * sum(sections), theta), np.cumsum(sections)[:-1])
    return rotate(x, _axis_angles(positions, speeds), interleaved=interleaved)


def xpos(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "b T"],
    *,
    keys: bool,
    theta: float = 10_000.0,
    base: float = 512.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """`rotary` whose products fade with distance, fast pairs first (xPos, arXiv 2212.10554, algorithm 1).

    Pair i grows by ((2i/D + 0.4) / 1.4)^(position / base), and keys by its inverse: of their product is left
    the power of their distance. Only distances count; count positions from the middle of sequences
    longer than some 30,000 tokens, where float32 would end.

    Args:
      x: queries or keys, (B, T, H, D).
      positions: of each token, (B, T) or (1, T).
      keys: whether x are keys, and not queries.
      theta: base of the frequencies.
      base: distance after which a pair has faded by its rate, tokens.
      interleaved: see `rotate`.
    """
    width = x.shape[-1] // 2 * 2
    rates = (jnp.arange(0, width, 2, dtype=jnp.float32) / width + 0.4) / 1.4
    powers = _angles(positions, jnp.log(rates)) / (-base if keys else base)
    angles = _angles(positions, frequencies(width, theta))
    return rotate(x, angles, factor=jnp.exp(powers), interleaved=interleaved)


def sinusoidal(positions: Int[Array, "B T"], width: int, halves: bool = False) -> Float[Array, "B T E"]:
    """sin and cos of position / 10000^(2i/E), side by side (Vaswani et al. 2017, section 3.5), or all of
    either in a half (Marian).
    """
    angles = _angles(positions, frequencies(width))
    if halves:
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :width]


def lookup_rows(
    table: Float[Array, "V E"], ids: Int[Array, "B T"], out_sharding: Any = None
) -> Float[Array, "B T E"]:
    """Return the table's row of each id; ids must be in range."""
    return table.at[ids].get(mode="promise_in_bounds", out_sharding=out_sharding)


def learned(positions: Int[Array, "B T"], table: Float[Array, "P E"]) -> Float[Array, "B T E"]:
    """Return the table's row of each position (Gehring et al. 2017, arXiv 1705.03122, section 3.1).

    Raises:
      InputError: a position outside the table. Where positions are traced it gives NaN instead.
    """
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    out_sharding = P(*jax.typeof(positions).sharding.spec, None) if in_mesh else None
    outside = (positions < 0) | (positions >= len(table))
    if not isinstance(positions, jax.core.Tracer) and outside.any():
        raise InputError(
            f"learned positions: the table has rows 0 to {len(table) - 1}; "
            f"asked for {positions.min()} to {positions.max()}"
        )
    rows = lookup_rows(table, jnp.clip(positions, 0, len(table) - 1), out_sharding)
    return jnp.where(outside[..., None], jnp.nan, rows)


def _angles(positions: Array, speeds: Array) -> Array:
    """Position times speed, (B, T, pairs)."""
    return positions[..., None].astype(jnp.float32) * speeds[None, None, :]


def _axis_angles(positions: Array, speeds: Sequence[Array]) -> Array:
    """The angles along each axis, one after the other."""
    along = jnp.moveaxis(positions, -1, 0)
    return jnp.concatenate([_angles(p, s) for p, s in zip(along, speeds, strict=True)], axis=-1)
