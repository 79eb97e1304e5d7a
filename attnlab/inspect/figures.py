"""Figures of attention: head grids, arcs, masks and image overlays.

Each function accepts array-likes and returns a matplotlib `Figure`; `save` writes PNG and SVG.
pyplot is not used, so there is no global state and no display is needed.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from attnlab.errors import InputError
from attnlab.inspect.layout import (
    COLOURS,
    FAINT,
    GREY,
    INK,
    SMALL,
    Box,
    add_panel,
    draw_colour_scale,
    draw_key_name,
    draw_query_name,
    draw_text,
    draw_title,
    font_families,
    legible,
    new_page,
    text_width,
)

PAGE_WIDTH = 7.5  # inches: figures of many heads fit a page, so that their text is not scaled
MAX_LABELS = 40  # an axis with more tokens shows positions instead of tokens
LINE = 0.11  # inches between adjacent labels of an axis
MIN_PANEL, MAX_PANEL = 0.55, 3.0  # inches: side of a heat map
ROW, ARC = 0.2, 1.1  # inches: height of a row of tokens, width of an arc
MIN_ARC_WEIGHT = 0.02
OVERLAY_ALPHA = 0.55


def save(figure: Figure, path: epath.PathLike) -> list[epath.Path]:
    """Write a figure to `path`.png (150 dpi) and `path`.svg, and return both paths.

    Missing directories are created. Equal figures give equal bytes: no date is written, and the
    SVG ids are salted with a constant.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = io.BytesIO(), io.BytesIO()  # matplotlib cannot write to cloud storage
    with matplotlib.rc_context({"svg.hashsalt": "attnlab"}):
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    paths = []
    for suffix, content in (("png", png), ("svg", svg)):
        paths.append(path.parent / f"{path.name}.{suffix}")
        paths[-1].write_bytes(content.getvalue())
    return paths


def as_float_array(values: ArrayLike, name: str) -> np.ndarray:
    """Return `values` as a float32 array, or raise `InputError` if they are not numbers."""
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of numbers, got {_describe(values)}") from error


def _describe(value: object) -> str:
    content = repr(value)
    return f"{type(value).__name__} {content if len(content) <= 60 else content[:57] + '...'}"


def head_grid(
    weights: ArrayLike,
    tokens: Sequence[str],
    title: str = "",
    key_tokens: Sequence[str] | np.ndarray | None = None,
    key_name: str = "key",
    max_width: float = PAGE_WIDTH,
) -> Figure:
    """Draw the attention map of every head on one colour scale: a row per layer, a column per head.

    Maps are scaled down until the figure is at most `max_width` inches wide. Axes of up to 40
    tokens are labelled with the tokens (every n-th one if not all fit), longer axes with positions.

    Args:
      weights: (L, H, T, S) in [0, 1].
      tokens: labels of the T queries, which run downwards.
      key_tokens: labels of the S keys, which run to the right; `tokens` by default. An array of
        numbers, such as times, gives a numeric axis.
      key_name: the name of the key axis, with its unit.

    Raises:
      InputError: `weights` has another shape, or the numbers of tokens are not T and S.
    """
    keys = tokens if key_tokens is None else key_tokens
    weights = _checked_maps(weights, "L H T S", tokens, keys)
    L, H, T, S = weights.shape
    queries, key_names = _axis_labels(tokens), _axis_labels(keys)
    gap, header, top = 0.14, 0.2, 0.95 if title else 0.6
    left = max(0.75, 0.35 + max(text_width(name, SMALL) for name in queries) if queries else 0.0)
    high, wide = _panel_size(T, S, (max_width - left - 0.15) / H - gap)
    shown = key_names[:: _label_step(S, wide)] if key_names else [" "]
    below = 0.3 + max(text_width(name, SMALL) for name in shown)
    panels = Box(left, top, H * (wide + gap) - gap, L * (high + header) - header)

    width = max(left + panels.width + 0.15, text_width(title, 12) + 0.15, 2.5)
    height = top + panels.height + below
    figure, page = new_page(width, height)
    draw_title(page, title)
    peak = float(np.nanmax(weights)) or 1.0
    draw_colour_scale(figure, Box(left, top - 0.49, 1.1, 0.08), peak)
    draw_key_name(page, panels.left + panels.width / 2, height - 0.12, key_name)
    extent = _extent(keys, T, S)
    for layer, head in np.ndindex(L, H):
        box = Box(left + head * (wide + gap), top + layer * (high + header), wide, high)
        axes = add_panel(figure, box)
        style: dict[str, Any] = {
            "cmap": COLOURS,
            "vmin": 0,
            "vmax": peak,
            "aspect": "auto",
            "interpolation": "nearest",
        }
        axes.imshow(weights[layer, head], extent=extent, **style)
        axes.spines[:].set(color=FAINT, linewidth=0.6)
        axes.tick_params(length=2, width=0.5, pad=2, labelsize=SMALL, colors=GREY)
        if layer == 0:
            draw_text(page, box.left, top - 0.06, f"head {head + 1}", fontsize=SMALL, color=GREY)
        if head == 0:
            draw_text(page, 0.12, box.top - 0.06, f"layer {layer + 1}", fontsize=SMALL, weight="bold")
            draw_query_name(page, 0.18, box.top + high / 2)
        _label_axis(axes.yaxis, queries, high, shown=head == 0)
        _label_axis(axes.xaxis, key_names, wide, shown=layer == L - 1, rotation=90 if key_names else 0)
    return figure


def _checked_maps(
    weights: ArrayLike, axes: str, tokens: Sequence[str], keys: Sequence[str] | np.ndarray
) -> np.ndarray:
    """Return attention maps as float32 after checking their axes and the numbers of tokens."""
    maps, names = as_float_array(weights, f"weights ({', '.join(axes.split())})"), axes.split()
    if maps.ndim != len(names) or maps.shape[-2:] != (len(tokens), len(keys)) or 0 in maps.shape:
        raise InputError(
            f"weights must have shape ({', '.join(names)}), T and S being the numbers of query and key "
            f"tokens: got {maps.shape} and ({len(tokens)}, {len(keys)}) tokens"
        )
    return maps


def _is_numeric(keys: Sequence[str] | np.ndarray) -> bool:
    return isinstance(keys, np.ndarray) and keys.dtype.kind in "iuf"


def _axis_labels(tokens: Sequence[str] | np.ndarray) -> list[str] | None:
    """Return the labels of an axis, or None if it is numeric or has more than MAX_LABELS tokens."""
    return None if _is_numeric(tokens) or len(tokens) > MAX_LABELS else [legible(t) for t in tokens]


def _panel_size(T: int, S: int, max_width: float) -> tuple[float, float]:
    """Return the height and width of a map in inches, with space for each label if it fits."""
    high, wide = (max(1.3, 0.125 * n if n <= MAX_LABELS else min(0.01 * n, MAX_PANEL)) for n in (T, S))
    scale = min(1.0, max(MIN_PANEL, max_width) / wide)
    return max(MIN_PANEL, high * scale), wide * scale


def _label_step(count: int, length: float) -> int:
    """Return the smallest n such that every n-th of `count` labels fits on `length` inches."""
    return math.ceil(LINE * count / length)


def _extent(keys: Sequence[str] | np.ndarray, T: int, S: int) -> tuple[float, float, float, float]:
    """Return the image limits that place pixel centres at the key and query positions."""
    first, last = (float(keys[0]), float(keys[-1])) if _is_numeric(keys) else (0.0, S - 1.0)
    half = (last - first) / (S - 1) / 2 if S > 1 else 0.5
    return first - half, last + half, T - 0.5, -0.5


def _label_axis(axis, labels: list[str] | None, length: float, shown: bool, rotation: float = 0) -> None:
    """Label every row or column, or every n-th one if not all labels fit on `length` inches."""
    if not shown:
        axis.set_ticks([])
    elif labels is None:
        axis.set_major_locator(MaxNLocator(4))
    else:
        step = _label_step(len(labels), length)
        style: dict[str, Any] = {
            "color": INK,
            "family": font_families(),
            "parse_math": False,
            "rotation": rotation,
        }
        axis.set_ticks(range(0, len(labels), step), labels=labels[::step], **style)


def arcs(
    weights: ArrayLike,
    tokens: Sequence[str],
    title: str = "",
    key_tokens: Sequence[str] | None = None,
    max_width: float = PAGE_WIDTH,
) -> Figure:
    """Draw each head of a layer as two columns of tokens, with a line from each query to its keys.

    The opacity of a line is its attention weight; weights below 0.02 are not drawn. This is the
    head view of Vig 2019 (arXiv 1906.05714).

    Args:
      weights: (H, T, S) in [0, 1].
      tokens: the T query tokens, on the left.
      key_tokens: the S key tokens, on the right; `tokens` by default.

    Raises:
      InputError: `weights` has another shape, or the numbers of tokens are not T and S.
    """
    key_tokens = tokens if key_tokens is None else key_tokens
    maps = _checked_maps(weights, "H T S", tokens, key_tokens)
    sides = [legible(token) for token in tokens], [legible(token) for token in key_tokens]
    left, right = (max(text_width(word, 8) for word in side) for side in sides)
    wide, high = left + ARC + right + 0.35, max(len(tokens), len(key_tokens)) * ROW + 0.65
    columns = min(len(maps), max(1, int((max_width - 0.2) / wide)))
    top = 0.45 if title else 0.1
    width = max(columns * wide, text_width(title, 12)) + 0.2
    figure, page = new_page(width, top + math.ceil(len(maps) / columns) * high)
    draw_title(page, title)
    for head, head_weights in enumerate(maps):
        y, x = top + head // columns * high, 0.2 + head % columns * wide + left
        draw_text(page, x + ARC / 2, y + 0.15, f"head {head + 1}", fontsize=SMALL, weight="bold", ha="center")
        draw_text(page, x - 0.06, y + 0.32, "query", fontsize=SMALL, color=GREY, ha="right")
        draw_text(page, x + ARC + 0.06, y + 0.32, "key", fontsize=SMALL, color=GREY)
        _draw_arcs(page, x, y + 0.4, *sides, head_weights)
    return figure


def _draw_arcs(
    page: Axes, x: float, y: float, queries: list[str], keys: list[str], weights: np.ndarray
) -> None:
    """Draw one head with its lines starting at `x` and its first row of tokens at `y`."""
    for place, align, side in [(x - 0.06, "right", queries), (x + ARC + 0.06, "left", keys)]:
        for row, word in enumerate(side):
            draw_text(page, place, y + (row + 0.5) * ROW, word, ha=align, va="center")
    pairs = np.argwhere(weights >= MIN_ARC_WEIGHT)
    ends = [[(x, y + (query + 0.5) * ROW), (x + ARC, y + (key + 0.5) * ROW)] for query, key in pairs]
    strength = np.clip(weights[tuple(pairs.T)], 0, 1)
    page.add_collection(
        LineCollection(ends, colors="#23649e", linewidths=0.4 + 1.8 * strength, alpha=strength)
    )


def mask_grid(masks: Mapping[str, ArrayLike], title: str = "", columns: int = 6) -> Figure:
    """Draw named (T, S) boolean masks: queries downwards, keys to the right, True coloured.

    Raises:
      InputError: `masks` is empty, or a mask is not a non-empty matrix.
    """
    arrays = {name: np.asarray(mask, bool) for name, mask in masks.items()}
    if not arrays or any(mask.ndim != 2 or 0 in mask.shape for mask in arrays.values()):
        shapes = ", ".join(f"{name} {mask.shape}" for name, mask in arrays.items())
        raise InputError(f"mask_grid() needs non-empty masks of shape (T, S): got {shapes or 'none'}")
    side, left, top, below = 1.6, 0.3, 0.55 if title else 0.15, 0.25
    wide, high = max(side, *(text_width(name, SMALL) for name in arrays)) + 0.15, side + 0.45
    columns = min(columns, len(arrays))
    rows = math.ceil(len(arrays) / columns)

    figure, page = new_page(left + columns * wide, top + rows * high - 0.1 + below)
    draw_title(page, title)
    draw_query_name(page, 0.13, top + rows * high / 2)
    draw_key_name(page, left + columns * wide / 2, top + rows * high)
    for number, (name, mask) in enumerate(arrays.items()):
        x, y = left + number % columns * wide, top + number // columns * high + 0.25
        axes = add_panel(figure, Box(x, y, side, side))
        axes.set_anchor("NW")
        T, S = mask.shape
        edges = np.arange(S + 1), np.arange(T + 1)
        lines = {"edgecolors": FAINT, "linewidth": 4 / max(T, S)} if max(T, S) <= 24 else {}
        axes.pcolormesh(*edges, mask, cmap=COLOURS, vmin=0, vmax=1.5, **lines)
        axes.set(xlim=(0, S), ylim=(T, 0), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(color=FAINT, linewidth=0.6)
        draw_text(page, x, y - 0.07, name, fontsize=SMALL)
    return figure


def image_overlay(image: ArrayLike, names: Sequence[str], weights: ArrayLike, title: str = "") -> Figure:
    """Draw an image once per token or head, with its patches coloured by their attention weight.

    Each map has its own colour scale, whose maximum is printed below the map.

    Args:
      image: (height, width), drawn white at 0 and black at 1.
      names: N labels, of tokens or heads.
      weights: (N, rows, columns), one map of the patches for each name.

    Raises:
      InputError: `image` or `weights` has another shape.
    """
    pixels, maps = as_float_array(image, "image"), as_float_array(weights, "weights")
    if pixels.ndim != 2 or maps.ndim != 3 or len(maps) != len(names) or 0 in maps.shape:
        raise InputError(
            "image must have shape (height, width) and weights (names, rows, columns): got "
            f"{pixels.shape} and {maps.shape} for {len(names)} names"
        )
    step, side, top = 1.35, 1.25, 0.7
    width = max(step * len(names) + 0.1, text_width(title, 12) + 0.3, 3.2)
    figure, page = new_page(width, top + side + 0.65)
    draw_title(page, title)
    for i, (name, weight) in enumerate(zip(names, maps, strict=True)):
        box, peak = Box(i * step + 0.1, top, side, side), float(np.nanmax(weight)) or 1.0
        middle = box.left + side / 2
        draw_text(page, middle, top - 0.12, legible(name), ha="center", va="center")
        draw_text(
            page, middle, top + side + 0.11, f"max {peak:.2g}", ha="center", va="center", fontsize=SMALL
        )
        axes = add_panel(figure, box)
        axes.set_axis_off()
        extent = (0.0, pixels.shape[1], pixels.shape[0], 0.0)
        axes.imshow(1 - pixels, cmap="gray", vmin=0, vmax=1, extent=extent)
        axes.imshow(weight, cmap=COLOURS, vmin=0, vmax=peak, alpha=OVERLAY_ALPHA, extent=extent)
    scale = Box(0.12, top + side + 0.3, 1.1, 0.08)
    draw_colour_scale(figure, scale, 1.0, "max of each map", OVERLAY_ALPHA)
    return figure
