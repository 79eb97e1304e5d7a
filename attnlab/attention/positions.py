"""Where a token stands: rotary and sinusoidal positions as functions of arrays."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    *,
    theta: float = 10_000.0,
    fraction: float = 1.0,
) -> Float[Array, "B T H D"]:
    """Rotates pairs (i, i + D'/2) of each head by angle position * theta^(-2i/D'), over the first
    D' = fraction * D of its width (RoFormer, arXiv 2104.09864, equation 34).
    """
    width = int(x.shape[-1] * fraction) // 2 * 2
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    a, b = jnp.split(turned, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if width < x.shape[-1] else turned


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T E"]:
    """sin and cos of position / 10000^(2i/E), side by side (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :width]
