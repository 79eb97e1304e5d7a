"""Patch embedding of images, videos and signals, and interpolation of its position table."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.errors import InputError
from attnlab.layers.linear import Dtypes, add_bias, contract, parameter
from attnlab.sharding import out_sharding


class PatchEmbedding(nn.Module):
    """z = x_p W + b for each patch x_p (ViT, arXiv 2010.11929, equation 1, without positions).

    The kernel has shape (height, width, channels, E). A PyTorch convolution kernel converts to it
    with "e c h w -> h w c e".

    Attributes:
      size: sides of a patch, or one number for all sides; three sides make tubelets of a video
        (ViViT, arXiv 2103.15691).
      width: model width E.
      std: standard deviation of the initial weights.
      bias: whether to add a bias b, which starts at zero.
      dtypes: dtypes of parameters and computation.
    """

    size: int | tuple[int, ...]
    width: int
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B *sides channels"]) -> Float[Array, "B T E"]:
        """Return one token per patch, row by row, in the compute dtype.

        Raises:
          InputError: a side of the image is not a multiple of the patch's side.
        """
        _, *sides, channels = x.shape
        pixels = patchify(x.astype(self.dtypes.compute), self.size)
        shape = (*_each(self.size, sides), channels, self.width)
        axes = (*["window"] * (len(shape) - 1), "embed")
        kernel = parameter(self, "kernel", shape, axes, self.dtypes, std=self.std)
        y = contract(pixels, kernel.reshape(-1, self.width), 1, ("embed",))
        return add_bias(self, y, (self.width,), ("embed",), self.dtypes) if self.bias else y


def patchify(x: Float[Array, "B *sides channels"], size: int | tuple[int, ...]) -> Float[Array, "B T pixels"]:
    """Return the flattened pixels of each patch, row by row.

    Raises:
      InputError: a side of the image is not a multiple of the patch's side.
    """
    b, *sides, channels = x.shape
    size = _each(size, sides)
    if len(size) != len(sides) or any(side % p for side, p in zip(sides, size, strict=True)):
        raise InputError(
            f"cannot split {_times(sides)} pixels into patches of {_times(size)}: "
            "each side must be a multiple of the patch's"
        )
    grid = [side // p for side, p in zip(sides, size, strict=True)]
    # (B, rows, height, columns, width, channels) -> (B, rows, columns, height, width, channels)
    n = 2 * len(sides)
    interleaved = [*itertools.chain(*zip(grid, size, strict=True)), channels]
    x = x.reshape(b, *interleaved, out_sharding=out_sharding("batch", *[None] * (n + 1)))
    x = x.transpose(0, *range(1, n, 2), *range(2, n + 1, 2), n + 1)
    shape = (b, math.prod(grid), math.prod(size) * channels)
    return x.reshape(shape, out_sharding=out_sharding("batch", None, None))


def _each(size: int | tuple[int, ...], sides: list[int]) -> tuple[int, ...]:
    """Return the sides of a patch, one for each side of the input."""
    return (size,) * len(sides) if isinstance(size, int) else size


def resize_positions(
    table: Float[Array, "positions E"],
    grid_from: tuple[int, int],
    grid_to: tuple[int, int],
    num_prefix_tokens: int = 0,
    antialias: bool = False,
) -> Float[Array, "resized E"]:
    """Return a learned position table interpolated from one grid of patches to another.

    ViT, section 3.2.

    Args:
      table: one row for each of `num_prefix_tokens` tokens, then one for each patch.
      grid_from: rows and columns of patches of the table.
      grid_to: rows and columns of patches of the result.
      num_prefix_tokens: tokens before the patches (class, registers), whose rows do not change.
      antialias: use a smoother cubic kernel, widened when the grid shrinks to average over the
        skipped positions, as in the training of DINOv2 with registers.

    Raises:
      InputError: the number of rows does not match `grid_from` and `num_prefix_tokens`.
    """
    if table.shape[0] != num_prefix_tokens + math.prod(grid_from):
        raise InputError(
            f"a table of {table.shape[0]} positions does not match {_times(grid_from)} patches and "
            f"{num_prefix_tokens} prefix token{'s' * (num_prefix_tokens != 1)}"
        )
    if grid_from == grid_to:
        return table
    rows, columns = (_cubic(*sizes, antialias) for sizes in zip(grid_from, grid_to, strict=True))
    grid = table[num_prefix_tokens:].reshape(*grid_from, -1).astype(jnp.float32)
    # Highest precision: a TPU would otherwise round the float32 weights to bfloat16.
    grid = jnp.einsum("xw,hwe->hxe", columns, grid, precision=jax.lax.Precision.HIGHEST)
    grid = jnp.einsum("yh,hxe->yxe", rows, grid, precision=jax.lax.Precision.HIGHEST)
    resized = grid.reshape(math.prod(grid_to), -1).astype(table.dtype)
    return jnp.concatenate([table[:num_prefix_tokens], resized])


def _cubic(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    """Return the weights of cubic convolution (Keys 1981) from old to new points at cell centres.

    Both of PyTorch's variants: a = -3/4 with repeated edges, or, with `antialias`, a = -1/2 with a
    stretched kernel and weights renormalised to sum to 1 over the points inside the grid.
    """
    a, stretch = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    margin = 2  # points beyond each edge that the kernel reaches
    points = np.arange(-margin, old + margin)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    d = np.abs(centres[:, None] - points) / stretch
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0))
    inside = weights[:, margin:-margin]
    if antialias:
        inside = inside / inside.sum(axis=1, keepdims=True)
    else:
        inside[:, 0] += weights[:, :margin].sum(axis=1)
        inside[:, -1] += weights[:, -margin:].sum(axis=1)
    return inside.astype(np.float32)


def _times(sizes) -> str:
    return " x ".join(map(str, sizes))
