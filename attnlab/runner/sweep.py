"""Sweeps: run requests one after the other and compare their metrics."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnlab.distributed.job import find_job, is_main_process
from attnlab.errors import InputError, StorageError, one_line
from attnlab.paths import as_json, write_atomically
from attnlab.runner.bug_report import report_bug
from attnlab.runner.exit_codes import ClaimsFailed, ExitCode, Stopped
from attnlab.runner.lock import WorkdirInUse
from attnlab.runner.request import Request

SHOWN = 4


def run_all(requests: Sequence[Request], run: Callable[[Request], Mapping[str, float] | None]) -> int:
    """Run every request, write `sweep.json` after each run, and print the table.

    A run that fails does not stop the sweep; its row contains the error. A signal stops the sweep.

    Returns:
      The exit code: FAILED if any run failed, else CLAIM_FAILED if a claim of any run failed.

    Raises:
      InputError: the flags of the job are invalid.
      Stopped: a signal stopped a run.
      WorkdirInUse: another process, such as the same sweep, writes to the workdir of a run.
    """
    first = requests[0].workdir
    assert first is not None
    job = find_job(requests[0].job)  # JAX does not know it before the first run has joined it
    prints = job is None or job.process_id == 0
    rows: list[dict[str, Any]] = []
    try:
        for number, request in enumerate(requests, 1):
            values = " ".join(f"config.{path}={text}" for path, text in request.swept.items())
            if prints:
                print(f"run {number} of {len(requests)}: {values}", flush=True)
            rows.append(_row(request, run))
            if is_main_process():
                write_atomically(first.parent / "sweep.json", _as_text(rows))
    finally:
        if rows:  # also after an interrupt
            print(table(rows), flush=True)
            print(f"saved in {first.parent / 'sweep.json'}", flush=True)
    if any(row["error"] for row in rows):
        return ExitCode.FAILED
    return ExitCode.CLAIM_FAILED if any(row["failed_claims"] for row in rows) else ExitCode.DONE


def _row(request: Request, run: Callable[[Request], Mapping[str, float] | None]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "values": dict(request.swept),
        "workdir": str(request.workdir),
        "metrics": {},
        "error": None,
        "failed_claims": [],
    }
    metrics: Mapping[str, float] = {}
    try:
        metrics = run(request) or {}
    except ClaimsFailed as error:
        metrics, row["failed_claims"] = error.metrics, error.claims
    except (BrokenPipeError, Stopped, WorkdirInUse):
        raise
    except Exception as error:
        if not isinstance(error, InputError | FloatingPointError | StorageError):
            print(report_bug(error), file=sys.stderr)
        row["error"] = one_line(error, 1000)
    row["metrics"] = {name: float(value) for name, value in metrics.items()}
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
