"""Training curves: a metric over the steps of a run, compared with named baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from attnlab.errors import InputError
from attnlab.inspect.layout import FAINT, GREY, draw_text, spread_apart, text_width

STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": "#6ba9d8", "linewidth": 1.0},
    "eval": {"color": "#0b2545", "linewidth": 1.8, "marker": "o", "markersize": 3},
}
LABEL_GAP = 0.055  # minimum distance between line labels, as a fraction of the axes' height
WARMUP = 0.05  # fraction of the steps whose values are ignored when the y axis is scaled


def training_curve(
    steps: ArrayLike,
    values: ArrayLike,
    eval_steps: ArrayLike = (),
    eval_values: ArrayLike = (),
    baselines: Mapping[str, float] | None = None,
    ylabel: str = "loss",
) -> Figure:
    """Plot a training and an evaluation metric over the steps, with named baselines.

    The y axis is scaled without the first twentieth of the steps.

    Args:
      steps, values: the training curve, two vectors of equal length.
      eval_steps, eval_values: the evaluation curve, two vectors of equal length.
      baselines: values drawn as dashed horizontal lines, by name.
      ylabel: the name of the metric.

    Raises:
      InputError: steps and values are not vectors of equal length.
    """
    baselines = dict(baselines or {})
    curves = {"train": _curve("train", steps, values), "eval": _curve("eval", eval_steps, eval_values)}
    curves = {name: curve for name, curve in curves.items() if curve[1].size}
    ends = [(value, f"{name} {_number(value)}", GREY) for name, value in baselines.items()]
    ends += [(y[-1], f"{name} {_number(y[-1])}", STYLES[name]["color"]) for name, (_, y) in curves.items()]

    figure = Figure(figsize=(7.2, 4.0), facecolor="white")
    right = 0.35 + max((text_width(label, 8) for _, label, _ in ends), default=0.0)
    axes = figure.add_axes((0.09, 0.13, 0.91 - right / 7.2, 0.82))
    for value in baselines.values():
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for name, (x, y) in curves.items():
        axes.plot(x, y, **STYLES[name])
    _fit_y(axes, [y[x >= WARMUP * x[-1]] for x, y in curves.values()], list(baselines.values()))
    _end_labels(axes, ends)
    _plain_axes(axes, "step", ylabel)
    return figure


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _curve(name: str, steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(
            f"{name}: steps and values must be vectors of equal length, got shapes {x.shape} and {y.shape}"
        )
    return x, y


def _fit_y(axes: Axes, curves: Sequence[np.ndarray], levels: Sequence[float]) -> None:
    finite = np.concatenate([*curves, levels])
    finite = finite[np.isfinite(finite)]
    if finite.size:
        low, high = finite.min(), finite.max()
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label each line (value, label, colour) at its right end without overlaps."""
    low, high = axes.get_ylim()
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    lines = np.array([np.clip((value - low) / (high - low), 0, 1) for value, _, _ in ends])
    for height, label_height, (_, label, colour) in zip(
        lines, spread_apart(lines, LABEL_GAP), ends, strict=True
    ):
        axes.plot(
            [1.0, 1.025],
            [height, label_height],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.7,
            clip_on=False,
        )
        draw_text(axes, 1.032, label_height, label, transform=axes.transAxes, va="center", color=colour)


def _plain_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=GREY)
    axes.set_ylabel(ylabel, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, labelsize=8, color=FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0)
