"""Time several implementations in alternation and print a table of their speeds.

The speed of a machine drifts with clock rates and other load. The implementations therefore
alternate: every round times each of them once. Speed ratios are computed within each round, under
the same load, and reported as the median over rounds.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Step = Callable[[], object]
"""One unit of work. Its result is passed to `jax.block_until_ready` at the end of a timing."""


class Unavailable(Exception):
    """An implementation cannot run here; the message states the reason."""


def available(builders: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Build every implementation that can run here, and print why others are skipped."""
    peers = {}
    for name, build in builders.items():
        try:
            peers[name] = build()
        except (Unavailable, ImportError) as reason:
            print(f"skipped {name}: {reason}")
    return peers


def alternate(peers: Mapping[str, Step], rounds: int, steps: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Return the seconds per step of each implementation, one number per round.

    Every round times `steps` steps of each implementation, after one untimed step that reclaims the
    memory freed by the previous implementation. The `warmup` steps include compilation.
    """
    for step in peers.values():
        _seconds(step, warmup)
    names = list(peers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in np.roll(names, -turn):
            _seconds(peers[str(name)], 1)
            seconds[str(name)].append(_seconds(peers[str(name)], steps) / steps)
    return {name: np.array(values) for name, values in seconds.items()}


def _seconds(step: Step, steps: int) -> float:
    import jax  # deferred: a process that measures the memory of another library imports this file

    start = time.perf_counter()
    for _ in range(steps):
        result = step()
    jax.block_until_ready(result)  # JAX dispatches asynchronously
    return time.perf_counter() - start


def table(seconds: Mapping[str, Sequence[float]], work: float, unit: str) -> str:
    """Return a table of throughput, milliseconds with quartiles, and relative speeds.

    Args:
      seconds: the seconds per step of each implementation, by round.
      work: the number of units that one step processes, such as 2,048 tokens.
      unit: the name of the unit.

    Returns:
      One row per implementation. A value above 1 in column "x NAME" means faster than NAME.
    """
    header = ["name", f"{unit}/s", "ms/step", "quartiles", *(f"x {name}" for name in seconds)]
    rows = []
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.asarray(times) * 1e3, [25, 50, 75])
        speedups = [np.median(np.asarray(other) / np.asarray(times)) for other in seconds.values()]
        rows.append(
            [name, f"{work / middle * 1e3:,.0f}", f"{middle:,.1f}", f"{low:,.1f} to {high:,.1f}"]
            + [f"{ratio:.2f}" for ratio in speedups]
        )
    return _aligned([header, *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def environment(*packages: str) -> str:
    """Return one line with the device, cores, Python version and versions of `packages`."""
    import jax

    device = jax.devices()[0]
    parts = [
        f"{jax.device_count()} x {device.device_kind}",
        f"{_cores()} cores",
        f"Python {platform.python_version()}",
    ]
    for package in packages:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def _cores() -> int:
    # A container may be limited to fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
