"""Pictures of attention and of training, as matplotlib figures.

Every function takes arrays (NumPy, or anything NumPy can read) and returns a `Figure`; `save`
writes it. No pyplot, hence no global state and no display. Figures are laid out in inches, so
that text keeps its size however many heads or words there are.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from attnlab.errors import InputError

INK, GREY, FAINT, ACCENT = "#1f2430", "#6b7280", "#d5d9e0", "#c2410c"
# White at 0, so that what is masked or ignored vanishes into the page.
COLOURS = LinearSegmentedColormap.from_list(
    "attention", ["#ffffff", "#cfe3f5", "#6ba9d8", "#23649e", "#0b2545"]
)
# DejaVu Sans comes with matplotlib; the others are asked for what it lacks, where they are installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei")
MOST_LABELS = 40
LONGEST_LABEL = 18
ROW, LAYER_GAP, ARC = 0.2, 0.14, 1.1  # inches: a line of words, between layers, the reach of an arc


# --- words


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The families that are installed, and every code point that one of them can draw."""
    families = [name for name in FONTS if name in font_manager.get_font_names()]
    paths = [font_manager.findfont(name) for name in families]
    return families, frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def legible(token: str) -> str:
    r"""A token as it can be drawn: "Ġthe" is "the", a newline is "\n", what no font has is "\u65e5".

    A leading space, or a tokenizer's mark for one (Ġ, ▁), is dropped, unless nothing else is there;
    then it is "␣". Long tokens end in "…".
    """
    word = token.lstrip("Ġ▁ ") or "␣" * len(token)
    if set(word) == {"Ċ"}:  # a byte-level tokenizer's newline
        word = "\n" * len(word)
    word = _drawable(word)
    return word if len(word) <= LONGEST_LABEL else word[: LONGEST_LABEL - 1] + "…"


def _drawable(words: str) -> str:
    """Escapes in place of what cannot be seen or what no font has."""
    known = _fonts()[1]
    return "".join(
        c if c.isprintable() and ord(c) in known else c.encode("unicode_escape").decode() for c in words
    )


def _text(axes: Axes, x: float, y: float, words: str, **style):
    # A dollar sign is a token, never the start of a formula.
    plain: dict[str, Any] = {"color": INK, "fontsize": 8, "family": _fonts()[0], "parse_math": False}
    return axes.text(x, y, _drawable(words), **(plain | style))


def _width(word: str, points: float) -> float:
    """Inches that a word takes, near enough: characters of DejaVu Sans average 0.62 em, others are square."""
    return sum(0.62 if ord(c) < 0x2E80 else 1.0 for c in word) * points / 72


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one bare set of axes whose unit is the inch, y downwards."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _scale_bar(figure: Figure, box: tuple[float, float, float, float], top: float) -> None:
    """A horizontal colour scale; `box` is left, top, width, height in inches."""
    width, height = figure.get_size_inches()
    left, above, wide, high = box
    axes = figure.add_axes((left / width, 1 - (above + high) / height, wide / width, high / height))
    bar = figure.colorbar(ScalarMappable(Normalize(0, top), COLOURS), cax=axes, orientation="horizontal")
    bar.set_ticks([0, top], labels=["0", f"{top:.2g}"])
    bar.ax.tick_params(labelsize=7, length=0, pad=2, colors=GREY)
    bar.outline.set(edgecolor=FAINT, linewidth=0.6)


# --- attention maps


def head_grid(
    weights: ArrayLike, tokens: Sequence[str], title: str = "", sources: Sequence[str] | None = None
) -> Figure:
    """Every head's attention map on one colour scale: a row of maps for each layer, a column for each head.

    weights (L, H, T, S) in [0, 1]; `tokens` names the T queries (downwards), `sources` the S keys (to
    the right), the same tokens if not given. Along an edge up to 40 tokens are written out.
    Errors: `InputError` if the numbers of tokens are not T and S.
    """
    sources = tokens if sources is None else sources
    weights = _maps(weights, "L H T S", tokens, sources)
    L, H, T, S = weights.shape
    points = 7.0
    high, wide = (max(1.3, 0.125 * n if n <= MOST_LABELS else min(0.01 * n, 3.0)) for n in (T, S))
    queries, keys = (
        [legible(token) for token in words] if len(words) <= MOST_LABELS else None
        for words in (tokens, sources)
    )
    left = 0.35 + max(_width(word, points) for word in queries) if queries else 0.6
    below = 0.15 + max(_width(word, points) for word in keys) if keys else 0.35
    gap, head, top = 0.14, 0.24, 0.95 if title else 0.6

    figure, page = _canvas(
        max(left + H * (wide + gap), _width(title, 12)) + 0.15, top + L * (high + head) - head + below + 0.1
    )
    width, height = figure.get_size_inches()
    peak = float(np.nanmax(weights)) or 1.0
    for layer, head_number in np.ndindex(L, H):
        x, y = left + head_number * (wide + gap), top + layer * (high + head)
        axes = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
        axes.imshow(
            weights[layer, head_number],
            cmap=COLOURS,
            vmin=0,
            vmax=peak,
            aspect="auto",
            interpolation="nearest",
        )
        axes.spines[:].set(color=FAINT, linewidth=0.6)
        axes.tick_params(length=0, pad=2, labelsize=points, colors=GREY)
        _text(page, x, y - 0.06, f"layer {layer + 1} / head {head_number + 1}", fontsize=7, color=GREY)
        _label(axes.yaxis, queries, shown=head_number == 0)
        _label(axes.xaxis, keys, shown=layer == L - 1, rotation=90 if keys else 0)
    _text(page, 0.12, 0.28, title, fontsize=11, weight="bold")
    _scale_bar(figure, (left, top - 0.49, 1.1, 0.08), peak)
    return figure


def _maps(weights: ArrayLike, axes: str, tokens: Sequence[str], sources: Sequence[str]) -> np.ndarray:
    """Attention maps as float32, checked to have these axes and a token for each query and key."""
    maps, names = np.asarray(weights, np.float32), axes.split()
    if maps.ndim != len(names) or maps.shape[-2:] != (len(tokens), len(sources)) or 0 in maps.shape:
        raise InputError(
            f"weights must be ({', '.join(names)}) with one token for each query and key: got {maps.shape} "
            f"and ({len(tokens)}, {len(sources)}) tokens"
        )
    return maps


def _label(axis, words: list[str] | None, shown: bool, rotation: float = 0) -> None:
    """Write a word at every row or column, or leave numbers where there are too many words."""
    if not shown:
        axis.set_ticks([])
    elif words is not None:
        style = {"color": INK, "family": _fonts()[0], "parse_math": False, "rotation": rotation}
        axis.set_ticks(range(len(words)), labels=words, **style)


# --- arcs


def arcs(
    weights: ArrayLike, tokens: Sequence[str], title: str = "", sources: Sequence[str] | None = None
) -> Figure:
    """One layer's heads, each as two columns of words with a line from every query to what it attends to.

    weights (H, T, S); `tokens` names the T queries on the left, `sources` the S keys on the right, the
    same tokens if not given. A line is as dark as its weight; below 0.02 it is left out (Vig 2019 draws
    heads so). Errors: `InputError` if the numbers of tokens are not T and S.
    """
    sources = tokens if sources is None else sources
    maps = _maps(weights, "H T S", tokens, sources)
    sides = [legible(token) for token in tokens], [legible(token) for token in sources]
    left, right = (max(_width(word, 8) for word in side) for side in sides)
    wide, high = left + ARC + right + 0.35, max(len(tokens), len(sources)) * ROW + 0.5
    rows, top = math.ceil(len(maps) * wide / 16), 0.45 if title else 0.1  # about 16 inches across
    abreast = math.ceil(len(maps) / rows)
    figure, page = _canvas(max(abreast * wide, _width(title, 12)) + 0.2, top + rows * high)
    _text(page, 0.12, 0.3, title, fontsize=11, weight="bold")
    for head, one in enumerate(maps):
        y, x = top + head // abreast * high, 0.2 + head % abreast * wide
        _text(page, x + left, y + 0.2, f"head {head + 1}", fontsize=7, color=GREY)
        _arcs(page, x + left, y + 0.3, *sides, one)
    return figure


def _arcs(page: Axes, x: float, y: float, queries: list[str], keys: list[str], weights: np.ndarray) -> None:
    """One head, its lines beginning at x and its words at y."""
    for place, align, side in [(x - 0.06, "right", queries), (x + ARC + 0.06, "left", keys)]:
        for row, word in enumerate(side):
            _text(page, place, y + (row + 0.5) * ROW, word, ha=align, va="center")
    pairs = np.argwhere(weights >= 0.02)
    ends = [[(x, y + (query + 0.5) * ROW), (x + ARC, y + (key + 0.5) * ROW)] for query, key in pairs]
    strength = np.clip(weights[tuple(pairs.T)], 0, 1)
    page.add_collection(
        LineCollection(ends, colors="#23649e", linewidths=0.4 + 1.8 * strength, alpha=strength)
    )


# --- masks


def mask_grid(masks: Mapping[str, ArrayLike], title: str = "", columns: int = 6) -> Figure:
    """Masks by name, (T, S) booleans: queries downwards, keys to the right, coloured where they may attend.

    Errors: `InputError` if there are none, or one is not a matrix.
    """
    drawn = {name: np.asarray(mask, bool) for name, mask in masks.items()}
    if not drawn or any(mask.ndim != 2 or 0 in mask.shape for mask in drawn.values()):
        shapes = ", ".join(f"{name} {mask.shape}" for name, mask in drawn.items())
        raise InputError(f"mask_grid() needs masks of shape (T, S): got {shapes or 'none'}")
    side, left, top = 1.6, 0.15, 0.55 if title else 0.15
    wide, high = max(side, *(_width(name, 7) for name in drawn)) + 0.15, side + 0.45
    columns = min(columns, len(drawn))

    figure, page = _canvas(left + columns * wide, top + math.ceil(len(drawn) / columns) * high)
    width, height = figure.get_size_inches()
    for number, (name, mask) in enumerate(drawn.items()):
        x, y = left + number % columns * wide, top + number // columns * high + 0.25
        axes = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
        axes.set_anchor("NW")
        T, S = mask.shape
        edges = np.arange(S + 1), np.arange(T + 1)
        lines = {"edgecolors": FAINT, "linewidth": 4 / max(T, S)} if max(T, S) <= 24 else {}
        axes.pcolormesh(*edges, mask, cmap=COLOURS, vmin=0, vmax=1.5, **lines)
        axes.set(xlim=(0, S), ylim=(T, 0), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set(color=FAINT, linewidth=0.6)
        _text(page, x, y - 0.07, name, fontsize=7)
    _text(page, left, 0.3, title, fontsize=11, weight="bold")
    return figure


# --- one word's look


class Look(NamedTuple):
    """Where one token of a sentence looks, in every head.

    tokens: S words. query: the index of the word that looks. weights (L, H, S): its attention.
    answer: the index of the word it ought to find (for "it", the antecedent), if there is one.
    """

    tokens: Sequence[str]
    query: int
    weights: Any
    answer: int | None = None


def looks(sentences: Sequence[Look | tuple], title: str = "") -> Figure:
    """Sentences side by side, one row a head: the words, shaded by how much the query attends to them.

    Made for twins such as "... because it was too tired / wide". The query is outlined in every row,
    the answer in another colour, with the weight it gets written at the row's end. Sentences too long
    for one page are placed below each other. Each is a `Look` or a tuple of its fields.
    Errors: `InputError` if words, indices and weights disagree, or the sentences differ in layers or heads.
    """
    looked = [_checked(Look(*sentence)) for sentence in sentences]
    shapes = {np.shape(look.weights)[:2] for look in looked}
    if len(shapes) != 1:
        raise InputError(
            f"looks() needs sentences of one model; their (L, H) are {sorted(shapes) or 'missing'}"
        )
    (L, H), peak = shapes.pop(), max(float(np.nanmax(look.weights)) for look in looked) or 1.0
    widths = [_sentence_edges(look)[-1] + 0.55 for look in looked]
    left, top, gap, tall = 1.05, 0.45 if title else 0.1, 0.35, 0.45 + L * (H * ROW + LAYER_GAP)
    abreast = left + sum(widths) + gap * (len(widths) - 1) <= 18
    size = (sum(widths) + gap * (len(widths) - 1), tall) if abreast else (max(widths), tall * len(widths))

    figure, page = _canvas(max(left + size[0] + 0.1, _width(title, 12), 5.5), top + size[1] + 0.4)
    _text(page, 0.12, 0.3, title, fontsize=11, weight="bold")
    x, y = left, top
    for index, look in enumerate(looked):
        if index == 0 or not abreast:
            _head_names(page, y, L, H)
        _look(page, x, y, look, peak)
        x, y = (x + widths[index] + gap, y) if abreast else (x, y + tall)
    _key(figure, page, left, top + size[1] + 0.1, peak, any(look.answer is not None for look in looked))
    return figure


def over_image(image: ArrayLike, words: Sequence[str], weights: ArrayLike, title: str = "") -> Figure:
    """Where in an image each word looks: the image once for each, its patches coloured by their weights.

    image (height, width), ink 1 on paper 0; weights (words, rows, columns), of one word on one scale.
    Errors: `InputError` if words and weights disagree.
    """
    picture, looked = np.asarray(image, np.float32), np.asarray(weights, np.float32)
    if picture.ndim != 2 or looked.ndim != 3 or len(looked) != len(words) or not words:
        raise InputError(
            f"image must be (height, width) and weights (words, rows, columns): got {picture.shape} and "
            f"{looked.shape} for {len(words)} words"
        )
    each, above = 1.35, 0.7
    figure, page = _canvas(each * len(words) + 0.1, each + above)
    _text(page, 0.1, 0.2, title, va="center", fontsize=9, weight="bold")
    for i, (word, look) in enumerate(zip(words, looked, strict=True)):
        _text(page, (i + 0.5) * each + 0.05, 0.55, legible(word), ha="center", va="center")
        box = ((i * each + 0.1) / (each * len(words) + 0.1), 0.05 / (each + above))
        size = (each - 0.1) / (each * len(words) + 0.1), (each - 0.1) / (each + above)
        axes = figure.add_axes((*box, *size))
        axes.set_axis_off()
        extent = (0.0, picture.shape[1], picture.shape[0], 0.0)
        axes.imshow(1 - picture, cmap="gray", vmin=0, vmax=1, extent=extent)
        axes.imshow(look / max(look.max(), 1e-9), cmap=COLOURS, vmin=0, vmax=1, alpha=0.55, extent=extent)
    return figure


def _checked(sentence: Look) -> Look:
    sentence = sentence._replace(weights=np.asarray(sentence.weights, np.float32))
    shape, count = sentence.weights.shape, len(sentence.tokens)
    if len(shape) != 3 or 0 in shape or shape[-1] != count:
        raise InputError(
            f"weights must be (L, H, S) with a weight for each token: got {shape} and ({count},) tokens"
        )
    for name, index in [("query", sentence.query), ("answer", sentence.answer)]:
        if index is not None and not 0 <= index < count:
            raise InputError(f"{name} {index} is not the index of a token; there are {count}, from 0")
    return sentence


def _sentence_edges(sentence: Look) -> np.ndarray:
    """Where the words' cells begin and end, in inches (S + 1,)."""
    return np.cumsum([0.0, *(max(0.22, _width(legible(token), 8) + 0.1) for token in sentence.tokens)])


def _head_names(page: Axes, y: float, L: int, H: int) -> None:
    _text(page, 0.97, y + 0.3, "head", va="center", ha="right", color=GREY, fontsize=7)
    for layer in range(L):
        above = y + 0.45 + layer * (H * ROW + LAYER_GAP) + ROW / 2
        _text(page, 0.12, above, f"layer {layer + 1}", va="center", weight="bold")
        for head in range(H):
            number = f"{head + 1}"
            _text(page, 0.97, above + head * ROW, number, va="center", ha="right", color=GREY, fontsize=7)


def _look(page: Axes, x: float, y: float, sentence: Look, peak: float) -> None:
    """One sentence, its head row by head row, with the top left corner at (x, y)."""
    words, edges = [legible(token) for token in sentence.tokens], x + _sentence_edges(sentence)
    middles = (edges[1:] + edges[:-1]) / 2
    marks = [(sentence.query, INK)] + ([(sentence.answer, ACCENT)] if sentence.answer is not None else [])
    for index, word in enumerate(words):
        style = {"color": dict(marks)[index], "weight": "bold"} if index in dict(marks) else {}
        _text(page, middles[index], y + 0.3, word, ha="center", va="center", **style)
    for layer, head in np.ndindex(*sentence.weights.shape[:2]):
        above = y + 0.45 + layer * (sentence.weights.shape[1] * ROW + LAYER_GAP) + head * ROW
        for index, weight in enumerate(sentence.weights[layer, head] / peak):
            _cell(page, edges[index], edges[index + 1], above, words[index], weight)
        for index, colour in marks:
            cell = (edges[index] + 0.01, above + 0.015), edges[index + 1] - edges[index] - 0.02, ROW - 0.03
            page.add_patch(Rectangle(*cell, fill=False, edgecolor=colour, linewidth=1.2))
        if sentence.answer is not None:
            found = f"{sentence.weights[layer, head, sentence.answer]:.2f}"
            _text(page, edges[-1] + 0.08, above + ROW / 2, found, va="center", color=ACCENT, fontsize=7)


def _cell(page: Axes, left: float, right: float, above: float, word: str, weight: float) -> None:
    box, colour = ((left, above), right - left, ROW), COLOURS(weight)
    page.add_patch(Rectangle(*box, facecolor=colour, edgecolor="white", linewidth=0.8))
    style = {"fontsize": 7.5, "color": "white" if weight > 0.55 else INK}
    _text(page, (left + right) / 2, above + ROW / 2, word, ha="center", va="center", **style)


def _key(figure: Figure, page: Axes, x: float, y: float, peak: float, answers: bool) -> None:
    """What colours and outlines mean."""
    _scale_bar(figure, (x, y + 0.02, 0.8, 0.08), peak)
    meanings = [(INK, "the word that looks")] + (
        [(ACCENT, "what it should find, and the weight it gets")] if answers else []
    )
    x += 1.0
    for colour, meaning in meanings:
        page.add_patch(Rectangle((x, y), 0.16, 0.12, fill=False, edgecolor=colour, linewidth=1.2))
        _text(page, x + 0.22, y + 0.065, meaning, va="center", fontsize=7, color=GREY)
        x += 0.22 + _width(meaning, 7) + 0.1


# --- training


def training_curve(
    steps: ArrayLike,
    values: ArrayLike,
    eval_steps: ArrayLike = (),
    eval_values: ArrayLike = (),
    baselines: Mapping[str, float] | None = None,
    ylabel: str = "loss",
) -> Figure:
    """A quantity while training, on the training and the evaluation set, against named baselines.

    steps, values (any one length); eval_steps, eval_values (another). The first twentieth of
    training does not stretch the y axis. Errors: `InputError` if steps and values differ in length.
    """
    baselines = dict(baselines or {})
    curves = {"train": _curve("train", steps, values), "eval": _curve("eval", eval_steps, eval_values)}
    curves = {name: curve for name, curve in curves.items() if curve[1].size}
    ends = [(value, f"{name} {_number(value)}", GREY) for name, value in baselines.items()]
    ends += [(y[-1], f"{name} {_number(y[-1])}", CURVES[name]["color"]) for name, (_, y) in curves.items()]

    figure = Figure(figsize=(7.2, 4.0), facecolor="white")
    right = 0.35 + max((_width(words, 8) for _, words, _ in ends), default=0.0)
    axes = figure.add_axes((0.09, 0.13, 0.91 - right / 7.2, 0.82))
    for value in baselines.values():
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for name, (x, y) in curves.items():
        axes.plot(x, y, **CURVES[name])
    _fit_y(axes, [y[x >= 0.05 * x[-1]] for x, y in curves.values()], list(baselines.values()))
    _end_labels(axes, ends)
    _plain_axes(axes, "step", ylabel)
    return figure


CURVES: dict[str, dict[str, Any]] = {
    "train": {"color": "#6ba9d8", "linewidth": 1.0},
    "eval": {"color": "#0b2545", "linewidth": 1.8, "marker": "o", "markersize": 3},
}


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _curve(name: str, steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"{name}: steps and values must have one length, got {x.shape} and {y.shape}")
    return x, y


def _fit_y(axes: Axes, curves: Sequence[np.ndarray], levels: Sequence[float]) -> None:
    seen = np.concatenate([*curves, levels])
    seen = seen[np.isfinite(seen)]
    if seen.size:
        low, high = seen.min(), seen.max()
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each line where it ends, (value, words, colour), moving names apart where lines are close."""
    low, high = axes.get_ylim()
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    lines = np.array([np.clip((value - low) / (high - low), 0, 1) for value, _, _ in ends])
    for height, name, (_, words, colour) in zip(lines, _apart(lines, 0.055), ends, strict=True):
        axes.plot(
            [1.0, 1.025], [height, name], transform=axes.transAxes, color=colour, linewidth=0.7, clip_on=False
        )
        _text(axes, 1.032, name, words, transform=axes.transAxes, va="center", color=colour)


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Ascending heights moved as little as is simple until neighbours are `gap` apart."""
    heights = heights.copy()
    for _ in range(200):  # neighbours that are too close push each other away
        near = np.maximum(gap - np.diff(heights), 0) / 2
        if near.max(initial=0) < 1e-4:
            break
        heights[1:] += near
        heights[:-1] -= near
    return heights


def _plain_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=GREY)
    axes.set_ylabel(ylabel, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, labelsize=8, color=FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0)


# --- files


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as `path`.png (150 dots an inch) and `path`.svg, with the directories they need.

    The same figure gives the same bytes: no date is written, and the SVG's ids are not random.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.parent / f"{path.name}.{suffix}" for suffix in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "attnlab"}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
