"""Masks for tokens on a grid, such as the patches of an image or the frames of a video."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from attnlab.attention.arrays import check_at_least
from attnlab.attention.masks.base import CountingMask, Mask
from attnlab.attention.pairwise import pytree, static
from attnlab.errors import InputError


class _Axis(NamedTuple):
    """One axis of a grid: its number of cells, and the window and dilation (`step`) along it."""

    cells: int
    window: int
    step: int

    def window_start(self, cell):
        """Return the first cell of the window, counted in cells `step` apart.

        At an edge the window is shifted inwards.
        """
        count = (self.cells - cell % self.step + self.step - 1) // self.step
        return jnp.clip(cell // self.step - self.window // 2, 0, count - self.window)

    def allows(self, cell, other):
        """Return whether `other` is in the window of `cell`."""
        nth = other // self.step - self.window_start(cell)
        return (cell % self.step == other % self.step) & (nth >= 0) & (nth < self.window)

    def count(self, cell, end):
        """Return how many cells before `end` are in the window of `cell`."""
        nth = (end - cell % self.step + self.step - 1) // self.step - self.window_start(cell)
        return jnp.clip(nth, 0, self.window)


@pytree
class NeighbourhoodMask(CountingMask):
    """The nearest `window` cells of a grid along each axis; tokens are in row-major order.

    At an edge the window is shifted inwards, so that every query has the same number of keys
    (NATTEN, arXiv 2204.07143; dilated, arXiv 2209.15001). Along one axis, neighbourhood(5, 3):

        keys  0 1 2 3 4
    query 0   x x x . .
    query 1   x x x . .
    query 2   . x x x .
    query 3   . . x x x
    query 4   . . x x x

    Attributes:
      shape: cells along each axis.
      window: allowed cells along each axis.
      dilation: distance between neighbouring allowed cells along each axis.
    """

    shape: tuple[int, ...] = static()
    window: tuple[int, ...] = static()
    dilation: tuple[int, ...] = static()

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        allowed = True
        for axis, query, key in zip(self._axes(), self._cells(at.q), self._cells(at.kv), strict=True):
            allowed &= axis.allows(query, key)
        return allowed

    def count_before(self, at):
        """See `CountingMask.count_before`: full slices before the key's, plus part of its own."""
        before, size = 0, 1
        cells = zip(self._axes(), self._cells(at.q), self._cells(at.kv), strict=True)
        for axis, query, key in reversed(list(cells)):
            before = axis.count(query, key) * size + axis.allows(query, key) * before
            size *= axis.window
        return before

    def _axes(self):
        return [_Axis(*axis) for axis in zip(self.shape, self.window, self.dilation, strict=True)]

    def _cells(self, index):
        """Return the coordinate of a token along each axis."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        first, *rest = [index // stride for stride in strides]
        return first, *(cell % n for cell, n in zip(rest, self.shape[1:], strict=True))


def neighbourhood(
    shape: int | tuple[int, ...], window: int | tuple[int, ...], dilation: int | tuple[int, ...] = 1
) -> Mask:
    """Return the neighbourhood-attention mask: the nearest cells of a grid along each axis.

    A window must be odd, or the whole axis: a window (1, W) of shape (H, W) is attention within
    rows.

    Raises:
      InputError: a window does not fit its axis, or the arguments differ in number of axes.
    """
    (shape,) = _axis_sizes("neighbourhood", shape=shape)
    window, dilation = _axis_sizes("neighbourhood", len(shape), window=window, dilation=dilation)
    if not len(shape) == len(window) == len(dilation):
        raise InputError(
            f"neighbourhood: shape {shape}, window {window} and dilation {dilation} must have the same "
            "number of axes"
        )
    for cells, width, step in zip(shape, window, dilation, strict=True):
        is_whole_axis = width == cells and step == 1
        if step < 1 or not (is_whole_axis or (width > 0 and width % 2 and width * step <= cells)):
            raise InputError(
                "neighbourhood: a window must be odd with window * dilation at most the size of its axis, "
                f"or be the whole axis; got shape {shape}, window {window}, dilation {dilation}"
            )
    return NeighbourhoodMask(shape, window, dilation)


def sliding_tile(shape: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]) -> Mask:
    """Return the mask that allows the nearest whole tiles of a grid.

    A query attends to every token of the nearest `window` tiles along each axis, so that a block of
    scores is either full or empty (Sliding Tile Attention, arXiv 2502.04507, section 3.1). Tokens
    must be ordered tile by tile: see `tile_order`.

    Args:
      shape: cells along each axis.
      tile: cells of a tile along each axis.
      window: allowed tiles along each axis.

    Raises:
      InputError: the tiles do not divide the grid, or `neighbourhood` rejects the window.
    """
    tiles = _tiles(shape, tile)
    (window,) = _axis_sizes("sliding_tile", len(tiles), window=window)
    tokens = math.prod(tile)
    return neighbourhood((*tiles, tokens), (*window, tokens))


def tile_order(shape: tuple[int, ...], tile: tuple[int, ...]) -> Int[np.ndarray, " T"]:
    """Return the permutation from row-major order to tiles, as `x[:, tile_order(...)]`.

    Raises:
      InputError: the tiles do not divide the grid.
    """
    sides = [side for pair in zip(_tiles(shape, tile), tile, strict=True) for side in pair]
    order = np.arange(math.prod(shape)).reshape(sides)
    return order.transpose(*range(0, len(sides), 2), *range(1, len(sides), 2)).reshape(-1)


def _axis_sizes(where: str, axes: int = 1, **sizes: Any) -> list[tuple[int, ...]]:
    """Return sizes along each axis as tuples; an integer applies to every axis.

    Raises:
      InputError: a size is not an integer of at least 1.
    """
    for name, x in sizes.items():
        for size in x if isinstance(x, list | tuple) else [x]:
            check_at_least(1, f"{where}: ", **{name: size})
    return [tuple(x) if isinstance(x, list | tuple) else (x,) * axes for x in sizes.values()]


def _tiles(shape, tile) -> list[int]:
    shape, tile = _axis_sizes("sliding_tile", shape=shape, tile=tile)
    if len(shape) != len(tile) or any(cells % side for cells, side in zip(shape, tile, strict=False)):
        raise InputError(f"sliding_tile: tiles of {tuple(tile)} do not divide a grid of {tuple(shape)}")
    return [cells // side for cells, side in zip(shape, tile, strict=True)]
