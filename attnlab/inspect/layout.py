"""Style and layout shared by all figures: colours, fonts, positions in inches, label placement.

Figures are laid out in inches, so that text keeps its size however many heads or tokens there are.
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
# matplotlib ships DejaVu Sans; the others, where installed, supply the characters that it lacks.
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
    """Return the installed families of FONTS and all code points that they cover."""
    families = [name for name in FONTS if name in font_manager.get_font_names()]
    paths = [font_manager.findfont(name) for name in families]
    return families, frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def legible(token: str) -> str:
    r"""Return a token as it can be drawn: "Ġthe" is "the", a newline is "\n".

    A leading space, or a tokenizer's mark for one (Ġ, ▁), is dropped; a token of spaces alone is
    "␣". Characters that no font has are escaped ("\u65e5"). Long tokens end in "…".
    """
    word = token.lstrip("Ġ▁ ") or "␣" * len(token)
    if set(word) == {"Ċ"}:  # a byte-level tokenizer's newline
        word = "\n" * len(word)
    word = _drawable(word)
    return word if len(word) <= MAX_LABEL_LENGTH else word[: MAX_LABEL_LENGTH - 1] + "…"


def _drawable(text: str) -> str:
    """Escape the characters that are invisible or in no font."""
    known = _fonts()[1]
    return "".join(
        c if c.isprintable() and ord(c) in known else c.encode("unicode_escape").decode() for c in text
    )


def draw_text(axes: Axes, x: float, y: float, text: str, **style):
    """Write text at a position of the axes; `style` overrides matplotlib's text properties."""
    # parse_math=False: a dollar sign is a token, never the start of a formula.
    plain: dict[str, Any] = {"color": INK, "fontsize": 8, "family": font_families(), "parse_math": False}
    return axes.text(x, y, _drawable(text), **(plain | style))


def text_width(text: str, points: float) -> float:
    """Estimate the width in inches: DejaVu Sans averages 0.62 em, CJK characters are square."""
    return sum(0.62 if ord(c) < 0x2E80 else 1.0 for c in text) * points / 72


def new_page(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this size with bare axes over all of it, in inches, y downwards."""
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
    """Write the title at the top left of the page."""
    draw_text(page, 0.12, 0.3, title, fontsize=TITLE_SIZE, weight="bold")


def draw_query_name(page: Axes, x: float, middle: float) -> None:
    """Name the query axis, reading upwards, left of a map whose middle is at this height."""
    draw_text(page, x, middle, "query", rotation=90, ha="center", va="center", color=GREY)


def draw_key_name(page: Axes, middle: float, y: float, name: str = "key") -> None:
    """Name the key axis below maps whose middle is at this x."""
    draw_text(page, middle, y, name, ha="center", va="center", color=GREY)


def draw_colour_scale(
    figure: Figure, box: Box, top: float, label: str | None = None, alpha: float | None = None
) -> None:
    """Draw a horizontal colour scale from 0 to `top`, whose end reads `label` if one is given."""
    axes = add_panel(figure, box)
    scale = ScalarMappable(Normalize(0, top), COLOURS)
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal", alpha=alpha)
    bar.set_ticks([0, top], labels=["0", f"{top:.2g}" if label is None else label])
    bar.ax.tick_params(labelsize=SMALL, length=0, pad=2, colors=GREY)
    bar.outline.set(edgecolor=FAINT, linewidth=0.6)


def spread_apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Return ascending heights moved until neighbours are at least `gap` apart."""
    heights = heights.copy()
    for _ in range(200):  # neighbours that are too close push each other away
        near = np.maximum(gap - np.diff(heights), 0) / 2
        if near.max(initial=0) < 1e-4:
            break
        heights[1:] += near
        heights[:-1] -= near
    return heights
