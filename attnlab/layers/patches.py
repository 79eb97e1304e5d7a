"""Images, videos or signals as tokens: one for each patch, and where it stands."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.errors import InputError
from attnlab.layers.linear import add_bias, contract
from attnlab.layers.parameters import Dtypes, parameter
from attnlab.sharding import out_sharding


class PatchEmbedding(nn.Module):
    """z = x_p W + b for each patch x_p of an image (ViT, arXiv 2010.11929, equation 1, without positions).

    The kernel is (height, width, channels, E), so that that of a convolution in PyTorch becomes it by
    "e c h w -> h w c e".

    Attributes:
      size: sides of a patch, or one size for all of them; a third makes tubelets of videos (ViViT,
        arXiv 2103.15691).
      width: model width E.
      std: deviation of the initial weights.
      bias: whether b is there; it starts at zero.
    """

    size: int | tuple[int, ...]
    width: int
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B *sides channels"]) -> Float[Array, "B T E"]:
        """A token of each patch in the compute dtype, row by row.

        Raises:
          InputError: sides that are no multiples of the patch's.
        """
        _, *sides, channels = x.shape
        pixels = patchify(x.astype(self.dtypes.compute), self.size)
        shape = (*_each(self.size, sides), channels, self.width)
        axes = (*["window"] * (len(shape) - 1), "embed")
        kernel = parameter(self, "kernel", shape, axes, self.dtypes, std=self.std)
        y = contract(pixels, kernel.reshape(-1, self.width), 1, ("embed",))
        return add_bias(self, y, (self.width,), ("embed",), self.dtypes) if self.bias else y


def patchify(x: Float[Array, "B *sides channels"], size: int | tuple[int, ...]) -> Float[Array, "B T pixels"]:
    """The pixels of each patch, row by row.

    Raises:
      InputError: sides that are no multiples of the patch's.
    """
    b, *sides, channels = x.shape
    size = _each(size, sides)
    if len(size) != len(sides) or any(side % p for side, p in zip(sides, size, strict=True)):
        raise InputError(
            f"{_times(sides)} pixels cannot be cut into patches of {_times(size)}: "
            "each side must be a multiple of the patch's"
        )
    grid = [side // p for side, p in zip(sides, size, strict=True)]
    # (B, rows, height, columns, width, channels) -> (B, rows, columns, height, width, channels)
    n = 2 * len(sides)
    interleaved = [*itertools.chain(*zip(grid, size, strict=True)), channels]
    x = x.reshape(b, *interleaved, out_sharding=out_sharding("batch", *[None] * (n + 1)))
    x = x.transpose(0, *range(1, n, 2), *range(2, n + 1, 2), n + 1)
    shape = (b, math.prod(grid), math.prod(size) * channels)
    return x.reshape(shape, out_sharding=out_sharding("batch", "sequence", None))


def _each(size: int | tuple[int, ...], sides: list[int]) -> tuple[int, ...]:
    """Sides of a patch, one for each side of what is cut."""
    return (size,) * len(sides) if isinstance(size, int) else size


def resize_positions(
    table: Float[Array, "positions E"],
    grid_from: tuple[int, int],
    grid_to: tuple[int, int],
    num_prefix_tokens: int = 0,
    antialias: bool = False,
) -> Float[Array, "resized E"]:
    """A learned table of positions on one grid of patches, interpolated to another (ViT, section 3.2).

    Args:
      table: a row for each of `num_prefix_tokens` tokens, then for each patch.
      grid_from: rows and columns of patches the table is for.
      grid_to: rows and columns wanted.
      num_prefix_tokens: tokens before the patches (class, registers), whose rows stay as they are.
      antialias: a smoother cubic that is widened to average over what a smaller grid leaves out,
        as DINOv2 with registers was trained with.

    Raises:
      InputError: the table has another number of rows.
    """
    if table.shape[0] != num_prefix_tokens + math.prod(grid_from):
        raise InputError(
            f"a table of {table.shape[0]} positions is not for {_times(grid_from)} patches and "
            f"{num_prefix_tokens} token{'s' * (num_prefix_tokens != 1)} before them"
        )
    if grid_from == grid_to:
        return table
    rows, columns = (_cubic(*sizes, antialias) for sizes in zip(grid_from, grid_to, strict=True))
    grid = table[num_prefix_tokens:].reshape(*grid_from, -1).astype(jnp.float32)
    # Sums of four terms by weights known to float32: a TPU would round them all to bfloat16.
    grid = jnp.einsum("xw,hwe->hxe", columns, grid, precision=jax.lax.Precision.HIGHEST)
    grid = jnp.einsum("yh,hxe->yxe", rows, grid, precision=jax.lax.Precision.HIGHEST)
    resized = grid.reshape(math.prod(grid_to), -1).astype(table.dtype)
    return jnp.concatenate([table[:num_prefix_tokens], resized])


def _cubic(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    """Weight of each old point in each new one by cubic convolution (Keys 1981), points at centres of cells.

    PyTorch's, in both its forms: with a = -3/4 and the edge repeated, or with a = -1/2, stretched, and
    weights that sum to 1 over the points there are.
    """
    a, stretch = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    beyond = 2  # points past each edge that the kernel reaches
    points = np.arange(-beyond, old + beyond)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    d = np.abs(centres[:, None] - points) / stretch
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0))
    inside = weights[:, beyond:-beyond]
    if antialias:
        inside = inside / inside.sum(axis=1, keepdims=True)
    else:
        inside[:, 0] += weights[:, :beyond].sum(axis=1)
        inside[:, -1] += weights[:, -beyond:].sum(axis=1)
    return inside.astype(np.float32)


def _times(sizes) -> str:
    return " x ".join(map(str, sizes))
