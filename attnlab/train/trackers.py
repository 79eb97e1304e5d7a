"""Weights & Biases and MLflow as metric sinks. A resumed run continues the same tracker run."""

import importlib
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from attnlab.config.text import render
from attnlab.errors import InputError
from attnlab.paths import write_atomically

IDS = "trackers.json"


def open_tracker(name: str, workdir: epath.Path, config: Mapping[str, Any]) -> "WandB | MLflow":
    """Return the tracker "wandb" or "mlflow", resuming the tracker run recorded in `workdir`.

    Raises:
      InputError: the name is unknown, or its package is not installed.
    """
    trackers: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}
    if name not in trackers:
        raise InputError(f"unknown tracker {name!r}: expected one of {', '.join(trackers)}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--tracker={name} requires the package {name}, which is not installed: pip install {name}"
        ) from error
    plain = {k: v if isinstance(v, bool | int | float | str) else render(v) for k, v in config.items()}
    return trackers[name](module, workdir, plain)


class WandB:
    """Weights & Biases, in the project $WANDB_PROJECT or "attnlab"."""

    def __init__(self, wandb: Any, workdir: epath.Path, config: Mapping[str, Any]):
        saved = _saved_id(workdir, "wandb")
        identity = saved or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "attnlab"),
            name=workdir.name,
            id=identity,
            resume="allow",
            config=dict(config),
        )
        # W&B's built-in step must increase, but a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")
        if saved is None:
            _save_id(workdir, "wandb", identity)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics as `split/metric`, with the step as its own metric."""
        self._run.log({"step": step} | {f"{split}/{name}": value for name, value in metrics.items()})

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """MLflow, in the experiment $MLFLOW_EXPERIMENT_NAME or "attnlab"."""

    def __init__(self, mlflow: Any, workdir: epath.Path, config: Mapping[str, Any]):
        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "attnlab"))
        if saved := _saved_id(workdir, "mlflow"):
            mlflow.start_run(run_id=saved)
            return  # parameters of an MLflow run cannot be changed once logged
        run = mlflow.start_run(run_name=workdir.name)
        items = list(config.items())
        for start in range(0, len(items), 100):  # MLflow's limit per call
            mlflow.log_params(dict(items[start : start + 100]))
        _save_id(workdir, "mlflow", run.info.run_id)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics as `split/metric`."""
        self._mlflow.log_metrics({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self, failed: bool = False) -> None:
        """End the run."""
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


def _saved_ids(workdir: epath.Path) -> dict[str, str]:
    file = workdir / IDS
    return json.loads(file.read_text()) if file.exists() else {}


def _saved_id(workdir: epath.Path, tracker: str) -> str | None:
    return _saved_ids(workdir).get(tracker)


def _save_id(workdir: epath.Path, tracker: str, identity: str) -> None:
    write_atomically(workdir / IDS, json.dumps(_saved_ids(workdir) | {tracker: identity}) + "\n")
