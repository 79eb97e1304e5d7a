"""Weights & Biases and MLflow as sinks. A run that goes on is the same run there, not a new one."""

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
    """The tracker called "wandb" or "mlflow", going on with the run that `workdir` has there.

    Raises InputError for another name, or where its package is not installed.
    """
    kinds: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}
    if name not in kinds:
        raise InputError(f"no tracker {name!r}; there are {', '.join(kinds)}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--tracker={name} needs a package that is not here: pip install {name}") from error
    plain = {k: v if isinstance(v, bool | int | float | str) else render(v) for k, v in config.items()}
    return kinds[name](module, workdir, plain)


class WandB:
    """Weights & Biases, in the project of $WANDB_PROJECT or "attnlab"."""

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
        # Its own step may only grow, and would refuse what a resumed run repeats.
        self._run.define_metric("*", step_metric="step")
        if saved is None:
            _save_id(workdir, "wandb", identity)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics as `split/metric`, with the step beside them."""
        self._run.log({"step": step} | {f"{split}/{name}": value for name, value in metrics.items()})

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """MLflow, in the experiment of $MLFLOW_EXPERIMENT_NAME or "attnlab"."""

    def __init__(self, mlflow: Any, workdir: epath.Path, config: Mapping[str, Any]):
        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "attnlab"))
        if saved := _saved_id(workdir, "mlflow"):
            mlflow.start_run(run_id=saved)
            return  # its parameters are set, and MLflow refuses to change one
        run = mlflow.start_run(run_name=workdir.name)
        items = list(config.items())
        for start in range(0, len(items), 100):  # the most that one call takes
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
