"""Rotary position embeddings, as functions of arrays.

A rotary embedding (RoPE) rotates each pair of the elements of a head by an angle, position *
frequency. `rotate` applies given angles. The others compute the angles: `rotary` from one position
per token, `axial` and `multimodal` from several. A `Scaling` adapts the frequencies to sequences
longer than those trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.attention.arrays import check_array, check_at_least, check_number, check_positions, describe
from attnlab.errors import InputError


def frequencies(width: int, theta: float = 10_000.0) -> Float[Array, " pairs"]:
    """Return theta^(-2i/width) of each pair i, in radians per token.

    (RoFormer, arXiv 2104.09864, section 3.2.2.)

    Raises:
      InputError: `theta` is not a finite number above 0.
    """
    check_number("rotary positions", 0, theta=theta)
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


@dataclass(frozen=True)
class Scaling:
    """Base class of context-length extensions of RoPE; this class itself changes nothing.

    A scaling modifies the rotary frequencies, and may multiply queries and keys by a factor.

    Raises:
      InputError: `original` is not an integer of at least 1, or another number is not above 0.
    """

    def __post_init__(self):
        where = type(self).__name__
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "original":
                check_at_least(1, f"{where}: ", original=value)
            elif not (value is field.default is None or isinstance(field.default, bool)):
                for factor in value if isinstance(value, tuple) else [value]:
                    check_number(where, 0, **{field.name: factor})

    @property
    def attention_factor(self) -> float:
        """Factor of both queries and keys; the scores are multiplied by its square."""
        return 1.0

    def __call__(self, width: int, theta: float, positions: Int[Array, "b T"]) -> Float[Array, " pairs"]:
        """Return the frequency of each pair of a rotary width, for tokens at these positions."""
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
    """NTK-aware scaling: a larger theta, which divides the last pair's frequency by the factor.

    (arXiv 2309.00071, section 3.1.)
    """

    factor: float

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        return _ntk(width, theta, self.factor)


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """`NTK` with a factor that grows with the sequence length (arXiv 2309.00071, section 3.3).

    The factor of `NTK` is 1 + factor * max(length / original - 1, 0). Keys in a KV cache are not
    rotated again when the length, and so the factor, grows.

    Attributes:
      factor: multiplier of the excess length; with 1, the factor of `NTK` is length / original.
      original: length trained on, in tokens.
    """

    factor: float
    original: int

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`."""
        excess = jnp.maximum((positions.max() + 1) / self.original - 1, 0)
        return _ntk(width, theta, 1 + self.factor * excess)


@dataclass(frozen=True)
class YaRN(Scaling):
    """Divides low frequencies by the factor and keeps high ones (arXiv 2309.00071, section 3).

    Attributes:
      factor: length extrapolated to, divided by the length trained on.
      original: length trained on, in tokens.
      fast: pairs with at least this number of rotations over the original length are unchanged.
      slow: pairs with at most this number of rotations are divided by the full factor.
      truncate: whether the ramp in between starts and ends at whole pairs.
      temperature: the attention factor; None means 0.1 log(factor) + 1 (section 3.4).
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
            """Solve original * theta^(-2i/width) = 2 pi turns for the pair i."""
            return width * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))

        # The ramp is linear in the index of the pair, as in the authors' code, not in its turns.
        first, last = pair(self.fast), pair(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        slowed = np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
        return _interpolate(frequencies(width, theta), self.factor, jnp.asarray(slowed, jnp.float32))


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """Divides the frequency of each pair by its own searched factor (arXiv 2402.13753, section 3).

    Attributes:
      short: factor of each pair in sequences up to the original length.
      long: factor of each pair in longer sequences.
      original: length trained on, in tokens.
      factor: length extrapolated to, divided by the length trained on.
      temperature: the attention factor; None means sqrt(1 + log(factor) / log(original)).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    temperature: float | None = None

    @property
    def attention_factor(self):
        """See `Scaling.attention_factor`."""
        if self.temperature is not None:
            return self.temperature
        return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original))

    def __call__(self, width, theta, positions):
        """See `Scaling.__call__`.

        Raises:
          InputError: `short` or `long` does not have one factor per pair.
        """
        if {len(self.short), len(self.long)} != {width // 2}:
            raise InputError(
                f"LongRoPE: a rotary width of {width} needs {width // 2} factors in both short and long; "
                f"got {len(self.short)} and {len(self.long)}"
            )
        short, long = (jnp.asarray(x, jnp.float32) for x in (self.short, self.long))
        return frequencies(width, theta) / jnp.where(positions.max() >= self.original, long, short)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Like `YaRN`, with a ramp linear in the turns and no attention factor (Llama 3.1).

    Attributes:
      factor: length extrapolated to, divided by the length trained on.
      original: length trained on, in tokens.
      slow: pairs with at most this number of rotations over the original length are divided by the
        full factor.
      fast: pairs with at least this number of rotations are unchanged.
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
    # (theta * factor^(width / (width - 2)))^(-2i/width): the last pair is divided by factor.
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / max(width - 2, 1)
    return frequencies(width, theta) * factor**-exponents


def _interpolate(plain: Array, factor: float, slowed: Array) -> Array:
    """Interpolate between frequencies (slowed = 0) and frequencies / factor (slowed = 1)."""
    return plain / factor * slowed + plain * (1 - slowed)


def rotate(
    x: Float[Array, "B T H D"],
    angles: Float[Array, "b T pairs"],
    *,
    factor: float | Float[Array, "b T pairs"] = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """Rotate the first P pairs of elements of each head and multiply them by a factor.

    Elements beyond the first 2P are unchanged. Pair i is elements (i, i + P), as in most models, or
    (2i, 2i + 1) if interleaved, as in RoFormer (arXiv 2104.09864, equation 34). The two layouts
    differ by a permutation of the elements.

    Args:
      x: queries or keys, (B, T, H, D).
      angles: angle of each token and pair, in radians, (B, T, P) or (1, T, P).
      factor: factor of each pair.
      interleaved: whether the elements of a pair are adjacent.

    Raises:
      InputError: 2P exceeds D, or an array is not floating-point.
    """
    check_array("rotate: x", x, "floating", 4)
    check_array("rotate: angles", angles, "floating", 3)
    width = 2 * angles.shape[-1]
    if width > x.shape[-1]:
        raise InputError(
            f"{width // 2} rotary pairs need a head_dim of at least {width}; it is {x.shape[-1]}"
        )
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
    """Apply rotary position embeddings (RoPE): rotate pair i by position * theta^(-2i/D').

    D' = fraction * D is the number of rotated elements of each head (RoFormer, arXiv 2104.09864,
    equation 34).

    Args:
      x: queries or keys, (B, T, H, D).
      positions: position of each token, (B, T) or (1, T).
      theta: base of the frequencies.
      fraction: fraction of the head width that is rotated.
      scaling: scaling of the frequencies; None means no scaling.
      interleaved: see `rotate`.

    Raises:
      InputError: an argument is of a wrong kind, or `fraction` is not above 0 and at most 1.
    """
    check_positions("rotary", x, positions, 2)
    check_number("rotary", 0, fraction=fraction)
    if fraction > 1:
        raise InputError(f"rotary: fraction must be at most 1, not {fraction}")
    if not isinstance(scaling, Scaling | None):
        raise InputError(f"rotary: scaling must be a Scaling such as YaRN(...), not {describe(scaling)}")
    scaling = scaling or Scaling()
    speeds = scaling(int(x.shape[-1] * fraction) // 2 * 2, theta, positions)
    angles = angles_of(positions, speeds)
    return rotate(x, angles, factor=scaling.attention_factor, interleaved=interleaved)


def axial(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "b T axes"],
    *,
    theta: float = 10_000.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """Apply axial RoPE: each axis of a grid rotates an equal share of the pairs.

    Each axis has the full range of frequencies. With two axes, the row rotates the first half of
    the pairs and the column the second half (RoPE-ViT, arXiv 2403.13298; the vision encoder of
    Qwen2-VL, arXiv 2409.12191).

    Args:
      x: queries or keys, (B, T, H, D).
      positions: position of each token along each axis, such as (row, column), (B, T, axes) or
        (1, T, axes).
      theta: base of the frequencies.
      interleaved: see `rotate`.

    Raises:
      InputError: D is not divisible by twice the number of axes, or an argument is of a wrong kind.
    """
    check_positions("axial", x, positions, 3)
    axes, width = positions.shape[-1], x.shape[-1]
    if width % (2 * axes):
        raise InputError(f"axial: {axes} axes need a head_dim divisible by {2 * axes}; it is {width}")
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
    """Apply multimodal RoPE (M-RoPE): each axis rotates one section of the frequencies.

    The axes share one range of frequencies. A text token, with the same position along all axes, is
    therefore rotated as by `rotary` (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
      x: queries or keys, (B, T, H, D).
      positions: position of each token along each axis, such as (time, row, column), (B, T, axes)
        or (1, T, axes).
      sections: number of pairs of each axis, from the highest frequency; (16, 24, 24) in Qwen2-VL.
      theta: base of the frequencies.
      interleaved: see `rotate`.

    Raises:
      InputError: `sections` does not have one entry per axis, or has more pairs than a head, or an
        argument is of a wrong kind.
    """
    check_positions("multimodal", x, positions, 3)
    for pairs in sections:
        check_at_least(0, "multimodal: the number of ", pairs=pairs)
    if len(sections) != positions.shape[-1]:
        raise InputError(
            f"multimodal: got {len(sections)} sections for {positions.shape[-1]} axes of positions"
        )
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
    """Apply xPos: RoPE with scores that decay with distance (arXiv 2212.10554, algorithm 1).

    Pair i of a query is multiplied by ((2i/D + 0.4) / 1.4)^(position / base), and of a key by the
    inverse, so that their product decays with the distance, fastest in the pairs of the highest
    frequency. Only distances matter. For sequences longer than about 30,000 tokens, count positions
    from the middle of the sequence: the factors would leave the range of float32.

    Args:
      x: queries or keys, (B, T, H, D).
      positions: position of each token, (B, T) or (1, T).
      keys: whether x are keys rather than queries.
      theta: base of the frequencies.
      base: distance in tokens over which pair i decays by (2i/D + 0.4) / 1.4.
      interleaved: see `rotate`.

    Raises:
      InputError: an argument is of a wrong kind, or `base` is not above 0.
    """
    check_positions("xpos", x, positions, 2)
    check_number("xpos", 0, base=base)
    width = x.shape[-1] // 2 * 2
    rates = (jnp.arange(0, width, 2, dtype=jnp.float32) / width + 0.4) / 1.4
    powers = angles_of(positions, jnp.log(rates)) / (-base if keys else base)
    angles = angles_of(positions, frequencies(width, theta))
    return rotate(x, angles, factor=jnp.exp(powers), interleaved=interleaved)


def angles_of(positions: Array, speeds: Array) -> Array:
    """Return position * speed, (B, T, pairs)."""
    return positions[..., None].astype(jnp.float32) * speeds[None, None, :]


def _axis_angles(positions: Array, speeds: Sequence[Array]) -> Array:
    """Return the angles along each axis, concatenated."""
    along = jnp.moveaxis(positions, -1, 0)
    return jnp.concatenate([angles_of(p, s) for p, s in zip(along, speeds, strict=True)], axis=-1)
