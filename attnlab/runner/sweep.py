"""Sweeps: run requests one after the other and compare their metrics."""

import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnlab.errors import InputError
from attnlab.paths import as_json, write_atomically
from attnlab.runner.request import Request

SHOWN = 4


def run_all(requests: Sequence[Request], run: Callable[[Request], Mapping[str, float] | None]) -> int:
    """Run every request, write `sweep.json` after each run, and print the table.

    A run that fails does not stop the sweep; its row contains the error.

    Returns:
      The exit code: 1 if any run failed.
    """
    first = requests[0].workdir
    assert first is not None
    rows: list[dict[str, Any]] = []
    try:
        for number, request in enumerate(requests, 1):
            values = " ".join(f"config.{path}={text}" for path, text in request.swept.items())
            print(f"run {number} of {len(requests)}: {values}", flush=True)
            rows.append(_row(request, run))
            write_atomically(first.parent / "sweep.json", _as_text(rows))
    finally:
        if rows:  # also after an interrupt
            print(table(rows), flush=True)
            print(f"saved in {first.parent / 'sweep.json'}", flush=True)
    return int(any(row["error"] for row in rows))


def _row(request: Request, run: Callable[[Request], Mapping[str, float] | None]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "values": dict(request.swept),
        "workdir": str(request.workdir),
        "metrics": {},
        "error": None,
    }
    try:
        row["metrics"] = {name: float(value) for name, value in (run(request) or {}).items()}
    except BrokenPipeError:
        raise
    except Exception as error:
        if not isinstance(error, InputError | FloatingPointError):
            traceback.print_exc(file=sys.stderr)
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        row["error"] = " ".join(f"{kind}{error}".split())
    return row


def _as_text(rows: Sequence[dict[str, Any]]) -> str:
    saved = [row | {"metrics": {name: as_json(x) for name, x in row["metrics"].items()}} for row in rows]
    return json.dumps(saved, indent=2, allow_nan=False) + "\n"


def ranked_by(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the metric that orders the table: a validation loss if any, else another loss."""
    losses = [name for row in rows for name in row["metrics"] if "loss" in name]
    validation = [name for name in losses if name.startswith(("val", "eval"))]
    return next(iter(validation + losses), None)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as an aligned table, best first: swept values, then metrics or the error."""
    rank = ranked_by(rows)

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        score = row["metrics"].get(rank, math.nan)
        return (bool(row["error"]) or math.isnan(score), 0.0 if math.isnan(score) else score)

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    names.sort(key=lambda name: name != rank)
    shown = names[:SHOWN]
    lines = [[*rows[0]["values"], *shown, ""]]
    for row in sorted(rows, key=order):
        numbers = [f"{row['metrics'][name]:.5g}" if name in row["metrics"] else "-" for name in shown]
        lines.append([*row["values"].values(), *numbers, f"failed: {row['error']}" if row["error"] else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return text + (f"\n(and {len(names) - SHOWN} more metrics in sweep.json)" if len(names) > SHOWN else "")
