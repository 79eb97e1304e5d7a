"""Runs the report of an experiment, and writes its numbers and claims."""

import json
from typing import Any

from attnlab.distributed.job import is_main_process
from attnlab.paths import as_json, write_atomically
from attnlab.runner.request import Request
from attnlab.runner.trained_model import TrainedModel

REPORT = "report.json"


def run_report(request: Request, trained: TrainedModel) -> dict[str, float]:
    """Run the experiment's `report(trained)`, if any, and write its numbers and claims."""
    report = getattr(request.loaded.module, "report", None)
    if report is None:
        return {}
    numbers = dict(report(trained) or {})
    claims = [claim.as_json() for claim in trained.claims]
    content: dict[str, Any] = {name: as_json(x) for name, x in numbers.items()} | {"claims": claims}
    if trained.fast:
        print("claims are not checked in a fast_dev_run")
        content["fast_dev_run"] = True
    if is_main_process():
        write_atomically(request.folder / REPORT, json.dumps(content, indent=2) + "\n")
    return numbers


def failed_claims(trained: TrainedModel) -> list[str]:
    """Return the names of the claims that failed. A fast_dev_run records no claim."""
    return [claim.text for claim in trained.claims if not claim.held]
