"""Training progress: a bar on a terminal, periodic lines in a file or pipe."""

import datetime
import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Prints step, loss, tokens/s (metrics "loss" and "tokens_per_second") and remaining time.

    On a terminal, the training split updates a bar, which shows "compiling" until the first write;
    other splits are printed as lines above it. Otherwise, a line of the training split is printed
    at the first write, then at most every ten seconds, and at the last step.
    """

    def __init__(self, steps: int | None = None, start: int = 0, console: Console | None = None):
        self._steps = steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._clock = _Clock(steps)
        self._printed = -math.inf
        self._bar = _bar(self._console, steps, start) if self._console.is_terminal else None

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step of one split."""
        training = split == "train"
        if training:
            self._clock.tick(step)
        if self._bar is not None and training:
            numbers = "  ".join(_numbers(metrics, others=0))
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=step, numbers=numbers, left=self._clock.left(step))
            return
        now = time.monotonic()
        if training:
            if now - self._printed < SECONDS_BETWEEN_LINES and step != self._steps:
                return
            self._printed = now
        left = [f"{self._clock.left(step)} left"] if training and step != self._steps else []
        self._console.print(
            "  ".join(
                [
                    self._format_step(step),
                    f"{split:<10}",
                    *_numbers(metrics, others=0 if training else 3),
                    *left,
                ]
            )
        )

    def close(self, failed: bool = False) -> None:
        """Stop the bar, leaving its last state on the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _format_step(self, step: int) -> str:
        if self._steps is None:
            return f"step {step:>6}"
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"


class _Clock:
    """Remaining time, from the pace since the first write, so that compilation does not count."""

    def __init__(self, steps: int | None):
        self._steps = steps
        self._first: tuple[int, float] | None = None
        self._pace: float | None = None

    def tick(self, step: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            self._pace = (now - self._first[1]) / (step - self._first[0])

    def left(self, step: int) -> str:
        if self._pace is None or self._steps is None:
            return "-:--:--"
        return str(datetime.timedelta(seconds=round(self._pace * max(self._steps - step, 0))))


def _bar(console: Console, steps: int | None, start: int) -> Bar:
    bar = Bar(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
        console=console,
        refresh_per_second=4,
    )
    bar.add_task("train", total=steps, completed=start, numbers="compiling", left="-:--:--")
    bar.start()
    return bar


def _numbers(metrics: Mapping[str, float], others: int) -> list[str]:
    """Format loss, speed and the first `others` other metrics; three without loss and speed."""
    known = {"loss": lambda x: f"loss {x:.4f}", "tokens_per_second": lambda x: f"{_short(x):>6} tokens/s"}
    main = [form(metrics[name]) for name, form in known.items() if name in metrics]
    rest = [f"{name} {value:.4g}" for name, value in metrics.items() if name not in known]
    return main + rest[: others if main else 3]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
