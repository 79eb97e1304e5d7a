"""Time several implementations of one thing in the same run, and print them side by side.

Machines drift: clocks step down, neighbours wake up. So the peers alternate (every round
times each of them once) and a ratio is taken within a round, where both saw the same
machine, before its median is taken over the rounds.
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
"""One unit of work. Whatever it returns is waited for at the end of a timing."""


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


def available(builders: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Build every peer that can run here, and print the reason for each that cannot."""
    peers = {}
    for name, build in builders.items():
        try:
            peers[name] = build()
        except (Unavailable, ImportError) as reason:
            print(f"skipped {name}: {reason}")
    return peers


def alternate(peers: Mapping[str, Step], rounds: int, steps: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds per step of each peer, one number a round.

    Every round times `steps` steps of every peer, after one that is not timed: memory that the peer
    before has given back to the system would be this one's to fetch again. Compilation falls into the
    `warmup` steps.
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
    import jax  # here, for a process that measures the memory of another library imports this file as well

    start = time.perf_counter()
    for _ in range(steps):
        result = step()
    jax.block_until_ready(result)  # JAX returns before it has computed; other leaves pass through
    return time.perf_counter() - start


def table(seconds: Mapping[str, Sequence[float]], work: float, unit: str) -> str:
    """A text table: throughput, milliseconds with quartiles, and speed against every peer.

    `work` is how many `unit`s one step does, for instance 2,048 tokens. A cell under "x NAME"
    above 1 means that the row's peer is faster than NAME.
    """
    header = ["peer", f"{unit}/s", "ms/step", "quartiles", *(f"x {name}" for name in seconds)]
    rows = []
    for name, mine in seconds.items():
        low, middle, high = np.percentile(np.asarray(mine) * 1e3, [25, 50, 75])
        speedups = [np.median(np.asarray(theirs) / np.asarray(mine)) for theirs in seconds.values()]
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
    """One line on where the numbers were taken: device, cores, Python, versions of `packages`."""
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
    # A container may own fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
