"""Checkpoints of a run: training state, data position and metrics, with digests of all files.

Orbax writes the state asynchronously while training continues.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from attnlab.distributed.collectives import broadcast, largest, settle, to_host
from attnlab.distributed.job import is_main_process
from attnlab.errors import InputError, StorageError, one_line
from attnlab.layers.linear import parameter_name
from attnlab.paths import CHECKPOINTS_FOLDER, absolute, is_remote, move_folder, numbered_entries, remove
from attnlab.train import digests
from attnlab.train.storage import system_error

DAMAGED_FOLDER = "damaged"
BEST_METRIC = "loss"
METRICS = "metrics.json"
POSITION = "data_position.json"  # the same in every process
# Names of a checkpoint while it is written or deleted: `7.tmp`, and Orbax's name within that.
PARTIAL = r"\d+(\.tmp|\.orbax-checkpoint-tmp(-\d+)?|\.tmp\.orbax-checkpoint-tmp(-\d+)?)"
OTHER_PROCESSES_TIMEOUT = 1200.0  # seconds, as in Orbax
DATA_FILE_BYTES = 64 << 20  # Orbax writes and syncs files of this size in parallel; its default is 2 GB

# Orbax raises the first of several failed tasks. asyncio would log the others when they are
# garbage-collected.
logging.getLogger("asyncio").addFilter(lambda record: "orbax/checkpoint" not in record.getMessage())


class SaveFailed(StorageError):
    """All processes know that a checkpoint could not be written, and may write another one.

    Attributes:
      own: whether the error is one of this process.
    """

    own = True


@dataclass
class _PendingSave:
    """A save in the background.

    Attributes:
      step: number of training steps done.
      own: writes the part of this process.
      whole: completes the checkpoint, in process 0 alone.
      abandoned: set if another process could not write its part.
      reported: whether its failure has been reported.
    """

    step: int
    own: Future
    whole: Future | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    reported: bool = False

    def failed(self) -> bool:
        """Return whether it has failed in this process."""
        parts = [self.own] if self.whole is None else [self.own, self.whole]
        return any(part.done() and part.exception() is not None for part in parts)


@dataclass(frozen=True)
class RestoredCheckpoint:
    """The contents of a checkpoint.

    Attributes:
      step: number of training steps done.
      state: the training state, in the layout passed to `Checkpoints.restore`.
      data: position of the input, which any number of processes can continue.
    """

    step: int
    state: Any
    data: dict


class Checkpoints:
    """Checkpoints of a run: keeps the latest ones and the best one.

    The best checkpoint is the one with the lowest validation loss. A checkpoint is written under
    another name and renamed once its digests are written. A bucket cannot rename; there the
    digests complete it.

    Args:
      workdir: the run's folder.
      keep: number of latest checkpoints to keep. None opens the folder read-only and changes
        nothing in it, since a run may be writing to it at the same time.
      log: called with each message for the user.

    Raises:
      InputError: `keep` is None and there are no checkpoints.
    """

    def __init__(
        self, workdir: str | epath.Path, keep: int | None = None, log: Callable[[str], None] = print
    ):
        self.root = epath.Path(absolute(str(workdir))) / CHECKPOINTS_FOLDER
        self._keep, self._log = keep, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _PendingSave | None = None
        self._removal: Future | None = None  # of the files of deleted checkpoints
        self._reported: set[int] = set()
        if keep is None and not self.root.exists():
            raise InputError(f"no checkpoint under {self.root}")
        if keep is not None and is_main_process():
            self._remove_partial()
        self._saved = set(self.steps())

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order, as process 0 sees them.

        Every process of a job must call it.
        """
        return broadcast(_steps(self.root))

    def best(self) -> int | None:
        """Return the step with the lowest validation loss; None if no checkpoint was evaluated."""
        return self._best(self.steps())

    def _best(self, steps: list[int]) -> int | None:
        losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
        return min(losses, key=lambda step: (math.isnan(losses[step]), losses[step])) if losses else None

    def has_metrics(self, step: int) -> bool:
        """Return whether the checkpoint of this step exists and contains a validation loss."""
        return step in self.steps() and self._loss(step) is not None

    def _loss(self, step: int) -> float | None:
        try:
            content = digests.read_checked(self._folder(step), METRICS)
        except digests.Damage as damage:
            # Otherwise the run has deleted this checkpoint since it was listed.
            if self._folder(step).exists() and step not in self._reported:
                self._log(f"the metrics of checkpoint {step} are damaged ({damage}): ignored")
                self._reported.add(step)
            return None
        return None if content is None else json.loads(content)[BEST_METRIC]

    def _folder(self, step: int) -> epath.Path:
        return self.root / str(step)

    def _partial_folder(self, step: int) -> epath.Path:
        """Return the folder of a checkpoint while it is written; a bucket cannot rename it."""
        return self._folder(step) if is_remote(self.root) else self.root / f"{step}.tmp"

    def save(self, step: int, state: Any, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Start writing a checkpoint. Does nothing if this step already has one.

        Arrays are copied before this method returns, so the state may be donated immediately. Every
        process of a job must call it.

        Raises:
          SaveFailed: the previous checkpoint could not be written, or a process alone cannot write
            this one. Calling it again writes this one.
          StorageError: a process of a job cannot write this one.
        """
        assert self._keep is not None, "opened read-only"
        self.wait()
        if step in self._saved:
            return
        files = {}
        if is_main_process():
            files[POSITION] = json.dumps(data)
        if metrics is not None and is_main_process():
            files[METRICS] = json.dumps(metrics)
        options = ocp.Context()
        options.array.saving.ocdbt_target_data_file_size = DATA_FILE_BYTES
        try:
            with options:
                self.root.mkdir(parents=True, exist_ok=True)
                written = ocp.save_async(self._partial_folder(step), state, overwrite=True)
                settle()  # Orbax compares the paths of all processes
        except Exception as error:
            # A process that called Orbax again alone would wait for the others forever.
            kind = SaveFailed if jax.process_count() == 1 else StorageError
            raise self._save_error(step, error, kind) from error
        self._saved.add(step)
        own = self._thread.submit(self._write_own_part, step, written, files)
        self._pending = pending = _PendingSave(step, own)
        if is_main_process():
            pending.whole = self._thread.submit(self._complete, pending)

    def _write_own_part(self, step: int, written: ocp.AsyncResponse, files: dict[str, str]) -> None:
        """Add the other files and the digests of this process."""
        partial = self._partial_folder(step)
        written.result()
        for name, text in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text)
        digests.write(partial, jax.process_index(), jax.process_count())

    def _complete(self, pending: _PendingSave) -> None:
        """Complete the checkpoint once all processes have written it, and delete old ones."""
        if pending.own.exception() is not None:
            return
        partial, deadline = self._partial_folder(pending.step), time.monotonic() + OTHER_PROCESSES_TIMEOUT
        while not digests.complete(partial):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the other processes did not write their part")
            if pending.abandoned.wait(0.1):
                return
        if partial != self._folder(pending.step):
            partial.rename(self._folder(pending.step))
        self._finish_removal()
        self._removal = self._thread.submit(lambda old: list(map(remove, old)), self._delete_old())

    def _finish_removal(self) -> None:
        """Wait for the removal after the previous save, and raise its error."""
        removal, self._removal = self._removal, None
        if removal is not None:
            removal.result()

    def _delete_old(self) -> list[epath.Path]:
        """Delete old checkpoints; return the folders whose files remain to be removed."""
        steps, old = _steps(self.root), []
        best = self._best(steps)
        for step in steps[: -max(1, self._keep or 1)]:
            if step == best:
                continue
            if is_remote(self.root):
                remove(self._folder(step) / digests.FOLDER)  # incomplete from now on
            else:
                self._folder(step).rename(self._partial_folder(step))
            old.append(self._partial_folder(step))
        return old

    def _remove_partial(self) -> None:
        """Remove the remains of a process killed while it saved or deleted a checkpoint."""
        for path in list(self.root.iterdir()) if self.root.exists() else ():
            if re.fullmatch(PARTIAL, path.name):
                remove(path)
        if is_remote(self.root):
            for step in set(numbered_entries(self.root)) - set(_steps(self.root)):
                remove(self._folder(step))

    def failed(self) -> bool:
        """Return, once per save, whether it has failed in this process; does not wait for it."""
        pending = self._pending
        if pending is None or pending.reported or not pending.failed():
            return False
        pending.reported = True
        return True

    def wait(self) -> None:
        """Block until the last save is on disk. Every process of a job must call it.

        Raises:
          SaveFailed: it could not be written, in any process, for example because the disk is full.
            Earlier checkpoints remain intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.own.exception()
        failed = largest(int(error is not None))
        if failed:
            pending.abandoned.set()
        if pending.whole is not None:
            error = pending.whole.exception() or error
        if failed or largest(int(error is not None)):
            others = OSError(errno.EIO, "another process could not write its part")
            failure = self._save_error(pending.step, error or others, SaveFailed)
            if isinstance(failure, SaveFailed):
                failure.own = error is not None
            raise failure from error

    def _save_error(self, step: int, error: BaseException, kind: type[StorageError]) -> BaseException:
        """Return the exception for a failed save, in one line, and remove its remains.

        An error that is not one of the storage is returned as it is.
        """
        reason = system_error(error)
        if reason is None:
            return error
        steps = _steps(self.root)
        if step not in steps:
            self._saved.discard(step)
            if is_main_process():
                with contextlib.suppress(OSError):  # the next save, or the next start, removes it
                    remove(self._partial_folder(step))
        complete = ", ".join(str(s) for s in steps if s != step) or "none"
        return kind(
            f"checkpoint {step} could not be written under {self.root}: {reason}; "
            f"complete checkpoints: {complete}"
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
                try:
                    self._finish_removal()
                except Exception as error:
                    raise self._save_error(max(self._saved, default=0), error, StorageError) from error
            elif self._pending is not None:  # the earlier exception takes precedence
                for part in filter(None, (self._pending.own, self._pending.whole)):
                    part.exception()
        finally:
            self._thread.shutdown()

    def close(self) -> None:
        """Wait for the last save."""
        self.__exit__(None)

    def restore(self, abstract_state: Any, which: str = "latest") -> RestoredCheckpoint:
        """Restore a checkpoint with the shardings of `abstract_state`, whichever mesh saved it.

        Its digests are checked first. Only a checkpoint that disagrees with them is damaged; any
        other error, such as one of the storage, leaves it where it is.

        Args:
          abstract_state: shapes, dtypes and shardings of the restored arrays.
          which: "latest", "best" or a step. If the latest is damaged, the one before it is restored
            and the damaged one is moved to the run's `damaged` folder.

        Raises:
          InputError: there is no such checkpoint, or none can be read.
        """
        step = self._select_step(which)
        candidates = [s for s in reversed(self.steps()) if s <= step] if which == "latest" else [step]
        damaged: dict[int, str] = {}
        for candidate in candidates:
            if damage := self._damage(candidate):
                damaged[candidate] = damage
                continue
            restored = self._load(candidate, abstract_state)
            for other, damage in damaged.items():
                self._log(
                    f"checkpoint {other} is damaged ({damage}): restoring checkpoint {candidate} instead"
                )
                self._set_aside(other)
            return restored
        none_left = ", and no earlier one is intact" if len(damaged) > 1 else ""
        raise InputError(f"checkpoint {step} under {self.root} is damaged ({damaged[step]}){none_left}")

    def _select_step(self, which: str) -> int:
        steps = self.steps()
        if not steps:
            raise InputError(f"no checkpoint under {self.root}")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = broadcast(self._best(steps))
            return steps[-1] if best is None else best
        if which not in map(str, steps):
            raise InputError(
                f"--checkpoint={which}: expected one of latest, best, {', '.join(map(str, steps))}"
            )
        return int(which)

    def _damage(self, step: int) -> str | None:
        """Return the damage of a checkpoint; None if it is intact.

        Each process checks a part of the files, and all return damage if one finds any.
        """
        index, count = jax.process_index(), jax.process_count()
        damage: str | None = None
        failure: Exception | None = None
        try:
            digests.check(self._folder(step), index, count)
        except digests.Damage as error:
            damage = str(error)
        except Exception as error:  # the type depends on the storage
            failure = error
        if count > 1:
            status = 2 if failure else 1 if damage else 0
            worst = largest(status)
            if worst == 2 and failure is None:
                failure = OSError(errno.EIO, "another process could not read it")
            if worst == 1 and damage is None:
                damage = "another process found it"
        if failure is not None:
            raise self._restore_error(step, failure) from failure
        return damage

    def _load(self, step: int, abstract_state: Any) -> RestoredCheckpoint:
        position = self._folder(step) / POSITION
        try:
            state = ocp.load(self._folder(step), abstract_state)
            data = json.loads(position.read_text())
        except Exception as error:  # no damage: the digests were right
            raise self._restore_error(step, error) from error
        return RestoredCheckpoint(step, state, data)

    def _restore_error(self, step: int, error: Exception) -> InputError:
        reason = system_error(error) or one_line(error, 160, unnamed=Exception)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = "out of memory"
        return InputError(f"checkpoint {step} under {self.root} could not be restored: {reason}")

    def _set_aside(self, step: int) -> None:
        """Move a damaged checkpoint away, so that its step can be saved again."""
        if self._keep is None:  # read-only access moves nothing
            return
        self._saved.discard(step)
        if not is_main_process():
            return
        target = self.root.parent / DAMAGED_FOLDER / str(step)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(
                f"{target.parent} is a file; remove it, since damaged checkpoints are moved there"
            ) from error
        remove(target)
        move_folder(self._folder(step), target)


def has_checkpoint(workdir: epath.Path) -> bool:
    """Return whether a run has saved a checkpoint, which may be damaged."""
    return bool(_steps(workdir / CHECKPOINTS_FOLDER))


def _steps(root: epath.Path) -> list[int]:
    steps = numbered_entries(root)
    return [s for s in steps if digests.complete(root / str(s))] if is_remote(root) else steps


def params_sha256(params: Any) -> str:
    """Return the SHA-256 of the names and bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted((parameter_name(path), leaf) for path, leaf in leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(to_host(leaf)).tobytes())
    return digest.hexdigest()
