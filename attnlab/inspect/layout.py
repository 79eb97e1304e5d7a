"""Style and layout shared by all figures: colours, fonts, positions in inches, label placement.

Positions are in inches, so that the text size does not depend on the number of heads or tokens.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

INK, GREY, FAINT, ACCENT = "#1f2430", "#6b7280", "#d5d9e0", "#c2410c"
# White at 0: masked and ignored tokens blend into the page.
COLOURS = LinearSegmentedColormap.from_list(
    "attention", ["#ffffff", "#cfe3f5", "#6ba9d8", "#23649e", "#0b2545"]
)
# matplotlib ships DejaVu Sans; the other fonts, if installed, supply characters missing from it.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei")
MAX_LABEL_LENGTH = 18
TITLE_SIZE, SMALL = 11, 7  # points


class Box(NamedTuple):
    """A rectangle of the page in inches; `top` is measured downwards from the top edge."""

    left: float
    top: float
    width: float
    height: float


def font_families() -> list[str]:
    """Return the installed families of FONTS."""
    return _fonts()[0]


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Return the installed families of FONTS and the set of code points that they cover."""
    families = [name for name in FONTS if name in font_manager.get_font_names()]
    paths = [font_manager.findfont(name) for name in families]
    return families, frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def legible(token: str) -> str:
    r"""Return the printable label of a token: "Ġthe" becomes "the", a newline becomes "\n".

    Leading spaces and tokenizer marks for them (Ġ, ▁) are removed; a token of spaces only becomes
    "␣" per space. Characters missing from every font are escaped ("\u65e5"). Labels longer than
    MAX_LABEL_LENGTH are truncated with "…".
    """
    word = token.lstrip("Ġ▁ ") or "␣" * len(token)
    if set(word) == {"Ċ"}:  # a byte-level tokenizer's newline
        word = "\n" * len(word)
    word = _drawable(word)
    return word if len(word) <= MAX_LABEL_LENGTH else word[: MAX_LABEL_LENGTH - 1] + "…"


def _drawable(text: str) -> str:
    """Escape characters that are not printable or missing from every font."""
    covered = _fonts()[1]
    return "".join(
        c if c.isprintable() and ord(c) in covered else c.encode("unicode_escape").decode() for c in text
    )


def draw_text(axes: Axes, x: float, y: float, text: str, **style):
    """Draw text at a position of the axes; `style` overrides the default text properties."""
    # parse_math=False: a dollar sign is part of a token, never the start of a formula.
    plain: dict[str, Any] = {"color": INK, "fontsize": 8, "family": font_families(), "parse_math": False}
    return axes.text(x, y, _drawable(text), **(plain | style))


def text_width(text: str, points: float) -> float:
    """Estimate the width of text in inches: DejaVu Sans averages 0.62 em, CJK characters 1 em."""
    return sum(0.62 if ord(c) < 0x2E80 else 1.0 for c in text) * points / 72


def new_page(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure and invisible axes that cover it, in inches with y pointing downwards."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def add_panel(figure: Figure, box: Box) -> Axes:
    """Add axes at a rectangle given in inches."""
    width, height = figure.get_size_inches()
    bottom = 1 - (box.top + box.height) / height
    return figure.add_axes((box.left / width, bottom, box.width / width, box.height / height))


def draw_title(page: Axes, title: str) -> None:
    """Draw the title at the top left of the page."""
    draw_text(page, 0.12, 0.3, title, fontsize=TITLE_SIZE, weight="bold")


def draw_query_name(page: Axes, x: float, middle: float) -> None:
    """Draw the name of the query axis at `x`, rotated, centred on height `middle`."""
    draw_text(page, x, middle, "query", rotation=90, ha="center", va="center", color=GREY)


def draw_key_name(page: Axes, middle: float, y: float, name: str = "key") -> None:
    """Draw the name of the key axis at height `y`, centred on `middle`."""
    draw_text(page, middle, y, name, ha="center", va="center", color=GREY)


def draw_colour_scale(
    figure: Figure, box: Box, top: float, label: str | None = None, alpha: float | None = None
) -> None:
    """Draw a horizontal colour scale from 0 to `top`, labelled `label` at its end if given."""
    axes = add_panel(figure, box)
    scale = ScalarMappable(Normalize(0, top), COLOURS)
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal", alpha=alpha)
    bar.set_ticks([0, top], labels=["0", f"{top:.2g}" if label is None else label])
    bar.ax.tick_params(labelsize=SMALL, length=0, pad=2, colors=GREY)
    bar.outline.set(edgecolor=FAINT, linewidth=0.6)


def spread_apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Return ascending `heights`, moved until neighbours are at least `gap` apart."""
    heights = heights.copy()
    for _ in range(200):  # move each pair that is too close apart by equal amounts
        near = np.maximum(gap - np.diff(heights), 0) / 2
        if near.max(initial=0) < 1e-4:
            break
        heights[1:] += near
        heights[:-1] -= near
    return heights
