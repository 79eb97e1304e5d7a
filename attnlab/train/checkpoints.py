"""Checkpoints of a run: training state, data position and metrics.

Orbax writes them asynchronously while training continues.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from attnlab.errors import InputError
from attnlab.layers.parameters import parameter_name
from attnlab.paths import absolute, move_folder

CHECKPOINTS_FOLDER = "checkpoints"
BEST_METRIC = "loss"
METRICS = "metrics/metrics"  # Orbax's path within a checkpoint

# Orbax raises the first of several failed tasks. asyncio would log the others when they are
# garbage-collected.
logging.getLogger("asyncio").addFilter(lambda record: "orbax/checkpoint" not in record.getMessage())


class DataPosition:
    """Position of this process's input, an Orbax checkpointable: one JSON file per process."""

    def __init__(self, state: dict | None = None):
        self.state = state

    @property
    def _file(self) -> str:
        return f"process_{jax.process_index()}_of_{jax.process_count()}.json"

    async def save(self, directory) -> Awaitable[None]:
        """Write the current position in the background."""
        text = json.dumps(self.state)

        async def write() -> None:
            path = await directory.await_creation()
            (epath.Path(path) / self._file).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Read the position of this process; None if the number of processes has changed."""

        async def read() -> None:
            path = epath.Path(directory) / self._file
            self.state = json.loads(path.read_text()) if path.exists() else None

        return read()


@dataclass(frozen=True)
class RestoredCheckpoint:
    """The contents of a checkpoint.

    Attributes:
      step: number of training steps done.
      state: the training state, in the layout passed to `Checkpoints.restore`.
      data: position of the input; None if it was saved by another number of processes.
    """

    step: int
    state: Any
    data: dict | None


class Checkpoints:
    """Checkpoint manager of a run, which keeps the latest checkpoints and the best one.

    The best checkpoint is the one with the lowest validation loss.

    Args:
      workdir: the run's folder.
      keep: number of latest checkpoints to keep. None opens the folder read-only and changes
        nothing in it, since a run may be writing to it at the same time.
      log: called with each message for the user.

    Raises:
      InputError: `keep` is None and there are no checkpoints, or no checkpoint can be read.
    """

    def __init__(
        self, workdir: str | epath.Path, keep: int | None = None, log: Callable[[str], None] = print
    ):
        self.root = epath.Path(absolute(str(workdir))) / CHECKPOINTS_FOLDER
        self._keep, self._log = keep, log
        self._pending: tuple[int, Any] | None = None
        if keep is None and not self.root.exists():
            raise InputError(f"no checkpoint under {self.root}")
        if keep is not None:
            self._set_unreadable_aside()
        # Read-only access needs no manager, whose constructor reads the metadata of every
        # checkpoint.
        self._manager = None if keep is None else self._open()

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[BEST_METRIC],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.training.Checkpointer(
            self.root,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep or 1), best]),
            cleanup_tmp_directories=self._keep is not None,
        )

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order."""
        if self._manager is not None:
            return sorted(c.step for c in self._manager.checkpoints)
        return self._step_folders()

    def _step_folders(self) -> list[int]:
        entries = self.root.iterdir() if self.root.exists() else ()
        return sorted(int(path.name) for path in entries if path.name.isdigit())

    def best(self) -> int | None:
        """Return the step with the lowest validation loss; None if no checkpoint was evaluated."""
        losses = {
            step: metrics[BEST_METRIC] for step in self.steps() if (metrics := self._read_metrics(step))
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def has_metrics(self, step: int) -> bool:
        """Return whether the checkpoint of this step exists and contains a validation loss."""
        return step in self.steps() and self._read_metrics(step) is not None

    def _read_metrics(self, step: int) -> dict[str, float] | None:
        try:
            return json.loads((self.root / str(step) / METRICS).read_text())
        except (OSError, ValueError):  # not evaluated, or damaged
            return None

    def save(self, step: int, state: Any, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Start writing a checkpoint. Does nothing if this step already has one.

        Arrays are copied before this method returns, so the state may be donated immediately.

        Raises:
          InputError: this or the previous checkpoint cannot be written.
        """
        assert self._manager is not None, "opened read-only"
        self.wait()
        if step in self.steps():
            return
        with self._as_input_error(step):
            pending = self._manager.save_checkpointables_async(
                step, {"state": state, "data": DataPosition(data)}, metrics=metrics, force=True
            )
        self._pending = step, pending

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
          InputError: it could not be written, for example because the disk is full. Earlier
            checkpoints remain intact.
        """
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            with self._as_input_error(step):
                pending.result()

    @contextlib.contextmanager
    def _as_input_error(self, step: int):
        """Convert the write errors of Orbax and TensorStore to an InputError of one line."""
        try:
            yield
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            complete = ", ".join(str(s) for s in self.steps() if s != step) or "none"
            raise InputError(
                f"checkpoint {step} could not be written under {self.root}: {reason}; "
                f"complete checkpoints: {complete}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except InputError:
            if kind is None:  # an earlier exception takes precedence
                raise
        finally:
            # Closing raises the error of a failed save a second time.
            with contextlib.suppress(Exception):
                if self._manager is not None:
                    self._manager.close()

    def close(self) -> None:
        """Wait for the last save and close the manager."""
        self.__exit__(None)

    def restore(self, abstract_state: Any, which: str = "latest") -> RestoredCheckpoint:
        """Restore a checkpoint with the shardings of `abstract_state`, whichever mesh saved it.

        Args:
          abstract_state: shapes, dtypes and shardings of the restored arrays.
          which: "latest", "best" or a step. If the latest is damaged, the one before it is restored
            and the damaged one is moved to the run's `damaged` folder.

        Raises:
          InputError: there is no such checkpoint, or none can be read.
        """
        step = self._select_step(which)
        candidates = [s for s in reversed(self.steps()) if s <= step] if which == "latest" else [step]
        failures: list[tuple[int, Exception]] = []
        for candidate in candidates:
            data = DataPosition()
            try:
                loaded = ocp.load_checkpointables(
                    self.root / str(candidate), {"state": abstract_state, "data": data}
                )
            except Exception as error:  # a damaged file raises many types in Orbax and TensorStore
                failures.append((candidate, error))
                continue
            for damaged, error in failures:
                self._log(
                    f"checkpoint {damaged} is damaged ({_first_line(error)}): "
                    f"restoring checkpoint {candidate} instead"
                )
                self._set_aside(damaged)
            return RestoredCheckpoint(candidate, loaded["state"], data.state)
        step, error = failures[0]
        raise InputError(
            f"checkpoint {step} under {self.root} cannot be read: {_first_line(error)}"
        ) from error

    def _select_step(self, which: str) -> int:
        steps = self.steps()
        if not steps:
            raise InputError(f"no checkpoint under {self.root}")
        if which == "latest":
            return steps[-1]
        if which == "best":
            return self.best() or steps[-1]
        if not which.isdigit() or int(which) not in steps:
            raise InputError(
                f"--checkpoint={which}: expected one of latest, best, {', '.join(map(str, steps))}"
            )
        return int(which)

    def _set_unreadable_aside(self) -> None:
        """Move checkpoints with unreadable metadata away: Orbax could not open the folder."""
        steps = self._step_folders()
        broken = {step: error for step in steps if (error := _metadata_error(self.root / str(step)))}
        if broken and len(broken) == len(steps):
            raise InputError(f"checkpoint {steps[-1]} under {self.root} cannot be read: {broken[steps[-1]]}")
        for step, error in broken.items():
            self._log(f"checkpoint {step} is damaged ({error}): moved to the damaged folder")
            self._move_to_damaged(step)

    def _set_aside(self, step: int) -> None:
        """Move a damaged checkpoint away, so that its step can be saved again."""
        if self._manager is not None:  # read-only access moves nothing
            self._move_to_damaged(step)
            self._manager.close()
            self._manager = self._open()

    def _move_to_damaged(self, step: int) -> None:
        target = self.root.parent / "damaged" / str(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmtree()
        move_folder(self.root / str(step), target)


def params_sha256(params: Any) -> str:
    """Return the SHA-256 of the names and bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted((parameter_name(path), leaf) for path, leaf in leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def _system_error(error: Exception) -> str | None:
    """Return the operating system's message for a write error; None for any other error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(r"([^:]*)\[os_error_code=", str(error))  # TensorStore's format
    return match[1].strip() if match else None


def _metadata_error(checkpoint: epath.Path) -> str | None:
    """Return the error in a checkpoint's metadata files; None if they can be read."""
    for name in ("_CHECKPOINT_METADATA", METRICS):
        try:
            if (file := checkpoint / name).exists():
                json.loads(file.read_text())
        except ValueError as error:
            return f"{name}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s+", " ", text.splitlines()[0])[:160]
