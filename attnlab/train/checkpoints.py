"""Checkpoints of a run: state, data position and metrics, written by Orbax while training goes on."""

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
METRICS = "metrics/metrics"  # within a checkpoint; as Orbax has it

# Of tasks that fail together Orbax tells the first; asyncio would log the others when they are collected.
logging.getLogger("asyncio").addFilter(lambda record: "orbax/checkpoint" not in record.getMessage())


class DataPosition:
    """Where this process's input stands, as Orbax saves and loads it: one small JSON file a process."""

    def __init__(self, state: dict | None = None):
        self.state = state

    @property
    def _file(self) -> str:
        return f"process_{jax.process_index()}_of_{jax.process_count()}.json"

    async def save(self, directory) -> Awaitable[None]:
        """Writes the position as it is now, in the background."""
        text = json.dumps(self.state)

        async def write() -> None:
            path = await directory.await_creation()
            (epath.Path(path) / self._file).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Reads the position that this process saved; None where another number of processes did."""

        async def read() -> None:
            path = epath.Path(directory) / self._file
            self.state = json.loads(path.read_text()) if path.exists() else None

        return read()


@dataclass(frozen=True)
class RestoredCheckpoint:
    """What a checkpoint held."""

    step: int
    state: Any
    data: dict | None


class Checkpoints:
    """The checkpoints under a run's workdir: the latest `keep`, and the best by validation loss.

    Args:
      workdir: the run's folder.
      keep: how many of the latest to keep; None only reads, and changes nothing in a folder that a run
        may be writing to at the same time.
      log: takes lines for the person.
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
        # A reader does without: Orbax reads the description of every checkpoint before it opens the folder.
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
        """Steps there are checkpoints of, first to last."""
        if self._manager is not None:
            return sorted(c.step for c in self._manager.checkpoints)
        return self._step_folders()

    def _step_folders(self) -> list[int]:
        entries = self.root.iterdir() if self.root.exists() else ()
        return sorted(int(path.name) for path in entries if path.name.isdigit())

    def best(self) -> int | None:
        """The step with the lowest validation loss; None if none was evaluated."""
        losses = {
            step: metrics[BEST_METRIC] for step in self.steps() if (metrics := self._read_metrics(step))
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def has_metrics(self, step: int) -> bool:
        """Whether there is a checkpoint of this step with its validation loss."""
        return step in self.steps() and self._read_metrics(step) is not None

    def _read_metrics(self, step: int) -> dict[str, float] | None:
        try:
            return json.loads((self.root / str(step) / METRICS).read_text())
        except (OSError, ValueError):  # not evaluated, or damaged
            return None

    def save(self, step: int, state: Any, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing a checkpoint; arrays are copied first, so the state may be donated at once."""
        assert self._manager is not None, "opened for reading only"
        self.wait()
        if step in self.steps():
            return
        with self._as_input_error(step):
            pending = self._manager.save_checkpointables_async(
                step, {"state": state, "data": DataPosition(data)}, metrics=metrics, force=True
            )
        self._pending = step, pending

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          InputError: it could not be written: the disk is full, say. Earlier checkpoints are whole.
        """
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            with self._as_input_error(step):
                pending.result()

    @contextlib.contextmanager
    def _as_input_error(self, step: int):
        """Turns what Orbax and TensorStore raise when they cannot write into one line."""
        try:
            yield
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            complete = ", ".join(str(s) for s in self.steps() if s != step) or "none"
            raise InputError(
                f"checkpoint {step} could not be written under {self.root}: {reason}; "
                f"complete ones: {complete}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except InputError:
            if kind is None:  # else what went wrong first is what to tell
                raise
        finally:
            # Closing tells of a save that failed once more.
            with contextlib.suppress(Exception):
                if self._manager is not None:
                    self._manager.close()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self.__exit__(None)

    def restore(self, abstract_state: Any, which: str = "latest") -> RestoredCheckpoint:
        """Loads a checkpoint onto the mesh that `abstract_state` is laid out on, whatever mesh it came from.

        Args:
          abstract_state: shapes, dtypes and shardings to load as.
          which: "latest", "best", or a step. A damaged latest falls back to the one before, and is set aside.

        Raises:
          InputError: no such checkpoint, or none that can be read.
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
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                failures.append((candidate, error))
                continue
            for damaged, error in failures:
                self._log(
                    f"checkpoint {damaged} is damaged ({_first_line(error)}): going back to {candidate}"
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
            raise InputError(f"--checkpoint={which}: there are latest, best, {', '.join(map(str, steps))}")
        return int(which)

    def _set_unreadable_aside(self) -> None:
        """Moves checkpoints out of the way whose description is broken: Orbax would not open the folder."""
        steps = self._step_folders()
        broken = {step: error for step in steps if (error := _metadata_error(self.root / str(step)))}
        if broken and len(broken) == len(steps):
            raise InputError(f"checkpoint {steps[-1]} under {self.root} cannot be read: {broken[steps[-1]]}")
        for step, error in broken.items():
            self._log(f"checkpoint {step} is damaged ({error}): set aside")
            self._move_to_damaged(step)

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
        if self._manager is not None:  # a reader leaves everything where it is
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
    """SHA-256 over the names and bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted((parameter_name(path), leaf) for path, leaf in leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def _system_error(error: Exception) -> str | None:
    """The operating system's reason for an error of writing; None for an error of another kind."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(r"([^:]*)\[os_error_code=", str(error))  # as TensorStore tells it
    return match[1].strip() if match else None


def _metadata_error(checkpoint: epath.Path) -> str | None:
    """What is wrong with the files that describe a checkpoint; None if they can be read."""
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
