"""Figures of attention as matplotlib `Figure`s: head grids, arcs, masks, image overlays; saving.

Every function takes arrays (NumPy, or anything NumPy can read) and returns a `Figure`; `save`
writes it. No pyplot, hence no global state and no display.
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

PAGE_WIDTH = 7.5  # inches: figures of many heads fit a page, so that their text is not scaled down
MAX_LABELS = 40  # tokens along an axis; more are numbered
LINE = 0.11  # inches from one label of an axis to the next
MIN_PANEL, MAX_PANEL = 0.55, 3.0  # inches: the side of a heat map
ROW, ARC = 0.2, 1.1  # inches: a row of tokens, the reach of an arc
MIN_ARC_WEIGHT = 0.02
OVERLAY_ALPHA = 0.55


def save(figure: Figure, path: epath.PathLike) -> list[epath.Path]:
    """Write a figure as `path`.png (150 dots per inch) and `path`.svg, creating directories.

    The same figure gives the same bytes: no date is written, and the SVG's ids are not random.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = io.BytesIO(), io.BytesIO()  # matplotlib writes no files in a bucket
    with matplotlib.rc_context({"svg.hashsalt": "attnlab"}):
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    paths = []
    for suffix, content in (("png", png), ("svg", svg)):
        paths.append(path.parent / f"{path.name}.{suffix}")
        paths[-1].write_bytes(content.getvalue())
    return paths


def as_float_array(values: ArrayLike, name: str) -> np.ndarray:
    """Return `values` as a float32 array. Raises InputError if they are not numbers."""
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

    weights (L, H, T, S) in [0, 1]; `tokens` names the T queries (downwards), `key_tokens` the S
    keys (to the right), by default the same tokens. Numbers instead of strings as `key_tokens`
    give a numeric axis, such as times; `key_name` is its name and unit. Maps shrink until the
    figure is `max_width` inches wide; up to 40 tokens are written, as many of them as have room.
    Errors: `InputError` if the numbers of tokens are not T and S.
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
    """Return attention maps as float32, after checking their axes and the number of tokens."""
    maps, names = as_float_array(weights, f"weights ({', '.join(axes.split())})"), axes.split()
    if maps.ndim != len(names) or maps.shape[-2:] != (len(tokens), len(keys)) or 0 in maps.shape:
        raise InputError(
            f"weights must be ({', '.join(names)}) with one token for each query and key: got {maps.shape} "
            f"and ({len(tokens)}, {len(keys)}) tokens"
        )
    return maps


def _is_numeric(keys: Sequence[str] | np.ndarray) -> bool:
    return isinstance(keys, np.ndarray) and keys.dtype.kind in "iuf"


def _axis_labels(tokens: Sequence[str] | np.ndarray) -> list[str] | None:
    """Return the labels of an axis; None for a numbered one: positions, or more than MAX_LABELS."""
    return None if _is_numeric(tokens) or len(tokens) > MAX_LABELS else [legible(t) for t in tokens]


def _panel_size(T: int, S: int, max_width: float) -> tuple[float, float]:
    """Return a map's height and width in inches: room for each label if max_width allows it."""
    high, wide = (max(1.3, 0.125 * n if n <= MAX_LABELS else min(0.01 * n, MAX_PANEL)) for n in (T, S))
    scale = min(1.0, max(MIN_PANEL, max_width) / wide)
    return max(MIN_PANEL, high * scale), wide * scale


def _label_step(count: int, length: float) -> int:
    """Return n if an axis of `length` inches has room for every n-th of `count` labels."""
    return math.ceil(LINE * count / length)


def _extent(keys: Sequence[str] | np.ndarray, T: int, S: int) -> tuple[float, float, float, float]:
    """Return the limits of an image whose pixel centres are the positions of keys and queries."""
    first, last = (float(keys[0]), float(keys[-1])) if _is_numeric(keys) else (0.0, S - 1.0)
    half = (last - first) / (S - 1) / 2 if S > 1 else 0.5
    return first - half, last + half, T - 0.5, -0.5


def _label_axis(axis, labels: list[str] | None, length: float, shown: bool, rotation: float = 0) -> None:
    """Write a label at every row or column, or at every n-th if `length` inches have no room."""
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

    weights (H, T, S); `tokens` names the T queries on the left, `key_tokens` the S keys on the
    right, by default the same tokens. A line is as dark as its weight; weights below 0.02 have none
    (the head view of Vig 2019, arXiv 1906.05714).
    Errors: `InputError` if the numbers of tokens are not T and S.
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
    """Draw one head; its lines begin at x and its first row of tokens at y."""
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
    """Draw named masks, (T, S) booleans: queries downwards, keys to the right, coloured where True.

    Errors: `InputError` if there are none, or one is not a matrix.
    """
    arrays = {name: np.asarray(mask, bool) for name, mask in masks.items()}
    if not arrays or any(mask.ndim != 2 or 0 in mask.shape for mask in arrays.values()):
        shapes = ", ".join(f"{name} {mask.shape}" for name, mask in arrays.items())
        raise InputError(f"mask_grid() needs masks of shape (T, S): got {shapes or 'none'}")
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
    """Draw an image once per word or head, its patches coloured by the attention they get.

    image (height, width), ink 1 on paper 0; weights (N, rows, columns), one map for each of the N
    names. Each map has its own colour scale, whose maximum stands below it.
    Errors: `InputError` if names and weights disagree.
    """
    pixels, maps = as_float_array(image, "image"), as_float_array(weights, "weights")
    if pixels.ndim != 2 or maps.ndim != 3 or len(maps) != len(names) or 0 in maps.shape:
        raise InputError(
            f"image must be (height, width) and weights (words, rows, columns): got {pixels.shape} and "
            f"{maps.shape} for {len(names)} words"
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
