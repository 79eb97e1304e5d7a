"""Masks of tokens that stand in a grid: pixels or patches of an image, frames of a film."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from attnlab.attention.masks.base import CountingMask, Mask
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


class _Axis(NamedTuple):
    """One axis of a grid: its cells, and how many of them, `step` apart, a cell sees."""

    cells: int
    window: int
    step: int

    def window_start(self, cell):
        """The first that it sees, counted among those `step` apart: the window shifts inwards at an edge."""
        count = (self.cells - cell % self.step + self.step - 1) // self.step
        return jnp.clip(cell // self.step - self.window // 2, 0, count - self.window)

    def allows(self, cell, other):
        """Whether it sees another."""
        nth = other // self.step - self.window_start(cell)
        return (cell % self.step == other % self.step) & (nth >= 0) & (nth < self.window)

    def count(self, cell, end):
        """How many before `end` it sees."""
        nth = (end - cell % self.step + self.step - 1) // self.step - self.window_start(cell)
        return jnp.clip(nth, 0, self.window)


@pytree
class NeighbourhoodMask(CountingMask):
    """The nearest cells of a grid, so many along each axis; tokens go through it row by row.

    At an edge the window shifts inwards, so that every query has as many keys (NATTEN, arXiv 2204.07143;
    dilated, arXiv 2209.15001). Along one axis, neighbourhood(5, 3):

        keys  0 1 2 3 4
    query 0   x x x . .
    query 1   x x x . .
    query 2   . x x x .
    query 3   . . x x x
    query 4   . . x x x

    Attributes:
      shape: cells along each axis.
      window: cells seen along each axis.
      dilation: how far they are apart.
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        allowed = True
        for axis, query, key in zip(self._axes(), self._cells(at.q), self._cells(at.kv), strict=True):
            allowed &= axis.allows(query, key)
        return allowed

    def count_before(self, at):
        """See `CountingMask.count_before`: whole slices before the key's, and the part of its own."""
        before, size = 0, 1
        cells = zip(self._axes(), self._cells(at.q), self._cells(at.kv), strict=True)
        for axis, query, key in reversed(list(cells)):
            before = axis.count(query, key) * size + axis.allows(query, key) * before
            size *= axis.window
        return before

    def _axes(self):
        return [_Axis(*axis) for axis in zip(self.shape, self.window, self.dilation, strict=True)]

    def _cells(self, index):
        """Where a token stands along each axis."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        first, *rest = [index // stride for stride in strides]
        return first, *(cell % n for cell, n in zip(rest, self.shape[1:], strict=True))


def neighbourhood(
    shape: int | tuple[int, ...], window: int | tuple[int, ...], dilation: int | tuple[int, ...] = 1
) -> Mask:
    """Return the mask that allows the nearest cells of a grid along each axis.

    Windows are odd, or whole axes: (1, W) of shape (H, W) is attention by rows.

    Raises:
      InputError: a window that is even, or wider than its axis, or another number of axes.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    window, dilation = ((x,) * len(shape) if isinstance(x, int) else tuple(x) for x in (window, dilation))
    if not len(shape) == len(window) == len(dilation):
        raise InputError(
            f"neighbourhood: shape {shape}, window {window}, dilation {dilation} must have as many axes"
        )
    for cells, width, step in zip(shape, window, dilation, strict=True):
        is_whole_axis = width == cells and step == 1
        if step < 1 or not (is_whole_axis or (width > 0 and width % 2 and width * step <= cells)):
            raise InputError(
                f"neighbourhood: a window must be odd and, times its dilation, fit its axis, or be the whole "
                f"axis; got shape {shape}, window {window}, dilation {dilation}"
            )
    return NeighbourhoodMask(shape, window, dilation)


def sliding_tile(shape: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]) -> Mask:
    """Return the mask that allows the nearest whole tiles of a grid.

    Tokens come tile by tile, in the order of `tile_order`.

    A query sees the nearest tiles, as many along each axis as `window` says, wholly, so that a block of
    scores is either full or empty (Sliding Tile Attention, arXiv 2502.04507, section 3.1).

    Args:
      shape: cells along each axis.
      tile: cells of a tile along each axis.
      window: tiles seen along each axis.

    Raises:
      InputError: tiles that do not fill the grid, or a window as for `neighbourhood`.
    """
    tiles = _tiles(shape, tile)
    tokens = math.prod(tile)
    return neighbourhood((*tiles, tokens), (*window, tokens))


def tile_order(shape: tuple[int, ...], tile: tuple[int, ...]) -> Int[np.ndarray, " T"]:
    """Return the row-major indices of tokens in the order of `sliding_tile`: `x[:, tile_order(...)]`.

    Raises:
      InputError: tiles that do not fill the grid.
    """
    sides = [side for pair in zip(_tiles(shape, tile), tile, strict=True) for side in pair]
    order = np.arange(math.prod(shape)).reshape(sides)
    return order.transpose(*range(0, len(sides), 2), *range(1, len(sides), 2)).reshape(-1)


def _tiles(shape, tile) -> list[int]:
    if len(shape) != len(tile) or any(cells % side for cells, side in zip(shape, tile, strict=False)):
        raise InputError(f"sliding_tile: tiles of {tuple(tile)} do not fill a grid of {tuple(shape)}")
    return [cells // side for cells, side in zip(shape, tile, strict=True)]
