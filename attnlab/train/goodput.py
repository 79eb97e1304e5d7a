"""Goodput: the share of wall time that a run spends in training steps, and where the rest goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("step", "compile", "input", "checkpoint", "evaluation", "report")


class Goodput:
    """Wall time of this process by part of the run, on the clock of the host.

    No device is synchronized for it. Steps are their dispatch and the wait for their metrics, one
    step late. Input is the wait for a batch, also while the devices still compute. Compilation is
    the first training step. A checkpoint is the time for which training waits for it. The rest,
    "other", is the start of the run, its metrics and its figures.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the enclosed time to a part; the parts do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start

    def shares(self) -> dict[str, float]:
        """Return the share of each part in the time since the start, and that of "other"."""
        total = max(self.total(), 1e-9)
        shares = {part: seconds / total for part, seconds in self.seconds.items()}
        return shares | {"other": max(0.0, 1.0 - sum(shares.values()))}

    def metrics(self) -> dict[str, float]:
        """Return the shares as metrics: `goodput` for steps, and `input_share` for input."""
        shares = self.shares()
        del shares["report"]  # the report runs after the last metrics
        return {"goodput": shares.pop("step")} | {f"{part}_share": share for part, share in shares.items()}

    def __str__(self) -> str:
        """Return the line for the end of a run."""
        shares = self.shares()
        rest = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if part != "step")
        return f"goodput {shares['step']:.1%} of {self.total():.0f} s; {rest}"
