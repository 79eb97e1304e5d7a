"""Figure of the attention of one query token over a sentence, in every layer and head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attnlab.errors import InputError
from attnlab.inspect.figures import as_float_array
from attnlab.inspect.layout import (
    ACCENT,
    COLOURS,
    GREY,
    INK,
    SMALL,
    Box,
    draw_colour_scale,
    draw_text,
    draw_title,
    legible,
    new_page,
    text_width,
)

ROW, LAYER_GAP, HEADER = (
    0.2,
    0.14,
    0.45,
)  # inches: height of a head's row, gap between layers, space above the rows
MAX_WIDTH = 18  # inches: sentences are stacked vertically if they are wider together


class QueryAttention(NamedTuple):
    """The attention weights of one token of a sentence, in every head.

    Attributes:
      tokens: the S tokens of the sentence.
      query: the index of the query token.
      weights: (L, H, S), the attention weights of the query.
      answer: the index of the token that the query should attend to (for "it", the antecedent).
    """

    tokens: Sequence[str]
    query: int
    weights: Any
    answer: int | None = None


def query_attention(sentences: Sequence[QueryAttention | tuple], title: str = "") -> Figure:
    """Draw sentences side by side, one row per head, with tokens shaded by attention weight.

    Use it to compare pairs such as "... because it was too tired / wide". The query is outlined in
    every row; the answer is outlined in another colour, and its weight is printed at the end of the
    row. Sentences that do not fit next to each other are stacked vertically.

    Args:
      sentences: `QueryAttention`s, or tuples of their fields.

    Raises:
      InputError: tokens, indices and weights of a sentence are inconsistent, or sentences differ in
        (L, H).
    """
    checked = [_checked(QueryAttention(*sentence)) for sentence in sentences]
    shapes = {np.shape(sentence.weights)[:2] for sentence in checked}
    if len(shapes) != 1:
        raise InputError(
            "query_attention() needs sentences with equal numbers of layers and heads (L, H); they are "
            f"{sorted(shapes) or 'missing'}"
        )
    (L, H), peak = shapes.pop(), max(float(np.nanmax(x.weights)) for x in checked) or 1.0
    widths = [_token_edges(sentence)[-1] + 0.55 for sentence in checked]
    left, top, gap = 1.05, 0.45 if title else 0.1, 0.35
    high, total = HEADER + L * (H * ROW + LAYER_GAP), sum(widths) + gap * (len(widths) - 1)
    side_by_side = left + total <= MAX_WIDTH
    size = (total, high) if side_by_side else (max(widths), high * len(widths))

    figure, page = new_page(max(left + size[0] + 0.1, text_width(title, 12), 5.5), top + size[1] + 0.4)
    draw_title(page, title)
    x, y = left, top
    for index, sentence in enumerate(checked):
        if index == 0 or not side_by_side:
            _head_names(page, y, L, H)
        _sentence(page, x, y, sentence, peak)
        x, y = (x + widths[index] + gap, y) if side_by_side else (x, y + high)
    _legend(figure, page, left, top + size[1] + 0.1, peak, any(s.answer is not None for s in checked))
    return figure


def _checked(sentence: QueryAttention) -> QueryAttention:
    sentence = sentence._replace(weights=as_float_array(sentence.weights, "weights"))
    shape, count = sentence.weights.shape, len(sentence.tokens)
    if len(shape) != 3 or 0 in shape or shape[-1] != count:
        raise InputError(
            f"weights must have shape (L, H, S), S being the number of tokens: got {shape} and "
            f"({count},) tokens"
        )
    for name, index in [("query", sentence.query), ("answer", sentence.answer)]:
        if index is not None and not 0 <= index < count:
            raise InputError(f"{name} {index} is not a token index; it must be from 0 to {count - 1}")
    return sentence


def _token_edges(sentence: QueryAttention) -> np.ndarray:
    """Return the (S + 1,) edges of the token cells, in inches."""
    return np.cumsum([0.0, *(max(0.22, text_width(legible(token), 8) + 0.1) for token in sentence.tokens)])


def _head_names(page: Axes, y: float, L: int, H: int) -> None:
    right: dict[str, Any] = {"va": "center", "ha": "right", "color": GREY, "fontsize": SMALL}
    draw_text(page, 0.97, y + 0.3, "head", **right)
    for layer in range(L):
        middle = y + HEADER + layer * (H * ROW + LAYER_GAP) + ROW / 2
        draw_text(page, 0.12, middle, f"layer {layer + 1}", va="center", weight="bold")
        for head in range(H):
            draw_text(page, 0.97, middle + head * ROW, f"{head + 1}", **right)


def _sentence(page: Axes, x: float, y: float, sentence: QueryAttention, peak: float) -> None:
    """Draw one sentence as a row of cells per head, with its top left corner at (x, y)."""
    words, edges = [legible(token) for token in sentence.tokens], x + _token_edges(sentence)
    middles = (edges[1:] + edges[:-1]) / 2
    marks = [(sentence.query, INK)] + ([(sentence.answer, ACCENT)] if sentence.answer is not None else [])
    for index, word in enumerate(words):
        style: dict[str, Any] = (
            {"color": dict(marks)[index], "weight": "bold"} if index in dict(marks) else {}
        )
        draw_text(page, middles[index], y + 0.3, word, ha="center", va="center", **style)
    for layer, head in np.ndindex(*sentence.weights.shape[:2]):
        top = y + HEADER + layer * (sentence.weights.shape[1] * ROW + LAYER_GAP) + head * ROW
        for index, weight in enumerate(sentence.weights[layer, head] / peak):
            _cell(page, Box(edges[index], top, edges[index + 1] - edges[index], ROW), words[index], weight)
        for index, colour in marks:
            cell = (edges[index] + 0.01, top + 0.015), edges[index + 1] - edges[index] - 0.02, ROW - 0.03
            page.add_patch(Rectangle(*cell, fill=False, edgecolor=colour, linewidth=1.2))
        if sentence.answer is not None:
            weight = f"{sentence.weights[layer, head, sentence.answer]:.2f}"
            x, middle = edges[-1] + 0.08, top + ROW / 2
            draw_text(page, x, middle, weight, va="center", color=ACCENT, fontsize=SMALL)


def _cell(page: Axes, box: Box, word: str, weight: float) -> None:
    patch = Rectangle(
        (box.left, box.top),
        box.width,
        box.height,
        facecolor=COLOURS(weight),
        edgecolor="white",
        linewidth=0.8,
    )
    page.add_patch(patch)
    style: dict[str, Any] = {"fontsize": 7.5, "color": "white" if weight > 0.55 else INK}
    middle = box.left + box.width / 2, box.top + box.height / 2
    draw_text(page, *middle, word, ha="center", va="center", **style)


def _legend(figure: Figure, page: Axes, x: float, y: float, peak: float, answers: bool) -> None:
    """Draw the colour scale and the meaning of the outlines."""
    draw_colour_scale(figure, Box(x, y + 0.02, 0.8, 0.08), peak)
    meanings = [(INK, "the query")] + (
        [(ACCENT, "the token it should attend to, and its weight")] if answers else []
    )
    x += 1.0
    for colour, meaning in meanings:
        page.add_patch(Rectangle((x, y), 0.16, 0.12, fill=False, edgecolor=colour, linewidth=1.2))
        draw_text(page, x + 0.22, y + 0.065, meaning, va="center", fontsize=SMALL, color=GREY)
        x += 0.22 + text_width(meaning, SMALL) + 0.1
