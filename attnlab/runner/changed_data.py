"""The fingerprint of a run's data in its workdir, compared when the run resumes."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from etils import epath

from attnlab.data import Data, Tokenizer
from attnlab.data.fingerprint import Fingerprint, changes, fingerprint
from attnlab.data.tokenizer import CONFIG_FILE, SOURCE_TARGET_FILES
from attnlab.distributed.job import is_main_process
from attnlab.errors import InputError
from attnlab.paths import write_atomically

FINGERPRINT, TOKENIZER = "data_fingerprint.json", "tokenizer.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Attributes:
      data: the fingerprint of the data set and its preparation.
      tokenizer: the hash of the tokenizer's files; None before they are written.
      changed_at: the step at which the data was replaced with `--allow_changed_data`. Positions in
        checkpoints up to this step belong to other data. None if it was never replaced.
    """

    data: Fingerprint
    tokenizer: str | None
    changed_at: int | None = None

    @classmethod
    def of(cls, data: Data, tokenizer: Tokenizer, workdir: epath.Path) -> "DataRecord":
        """Return the record of a data set as it is now."""
        return cls(fingerprint(data, tokenizer), _tokenizer_hash(workdir))

    @classmethod
    def load(cls, workdir: epath.Path) -> "DataRecord | None":
        """Return the record of a run; None if an earlier version wrote none.

        Raises:
          InputError: the file is damaged.
        """
        file = workdir / FINGERPRINT
        try:
            saved = json.loads(file.read_text())
            record = cls(saved["data"], saved["tokenizer"], saved["changed_at"])
            changes(record.data, record.data)
            return record
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}); delete it to skip the comparison") from error

    def save(self, workdir: epath.Path) -> None:
        """Write the record, in process 0, with the hash of the tokenizer's files."""
        if is_main_process():
            content = {**vars(self), "tokenizer": _tokenizer_hash(workdir)}
            write_atomically(workdir / FINGERPRINT, json.dumps(content, indent=1) + "\n")

    def differences(self, now: "DataRecord") -> str:
        """Return the differences in one line; empty if there are none."""
        tokenizer = f"{TOKENIZER} has changed" if self.tokenizer != now.tokenizer else ""
        return "; ".join(filter(None, (tokenizer, changes(self.data, now.data))))


def compare(workdir: epath.Path, now: DataRecord, step: int, allowed: bool) -> DataRecord:
    """Compare the data with that of the run, which resumes at `step`.

    Args:
      workdir: the run's folder.
      now: the data as it is now.
      step: the step of the latest checkpoint.
      allowed: whether the data may have changed; a line then reports it.

    Returns:
      `now`, with the step at which the data changed.

    Raises:
      InputError: the data has changed, and this is not allowed; the message names what changed.
    """
    saved = DataRecord.load(workdir)
    if saved is None:
        return now
    different = saved.differences(now)
    if not different:
        return replace(now, changed_at=saved.changed_at)
    if now.data["coverage"] == "sampled":
        different += " (compared by sizes and samples, since it is large)"
    if not allowed:
        raise InputError(
            f"the data of {workdir} has changed since its checkpoint: {different}; "
            "restore it, or resume with --allow_changed_data"
        )
    print(f"the data has changed: {different}")
    return replace(now, changed_at=step)


def set_position(batches: Any, position: dict, step: int, record: DataRecord, allowed: bool) -> None:
    """Restore the position of a checkpoint, unless it belongs to other data.

    The input then starts at its first batch.
    """
    if record.changed_at is not None and step <= record.changed_at:
        print("the input starts again at its first batch")
        return
    try:
        batches.set_state(position)
    except InputError:
        if not allowed:
            raise
        print("the position in the data cannot be restored: the input starts again at its first batch")


def _tokenizer_hash(workdir: epath.Path) -> str | None:
    """Return a hash of the tokenizer's files; None if there are none yet."""
    digest, found = hashlib.sha256(), False
    for name in (TOKENIZER, CONFIG_FILE, *SOURCE_TARGET_FILES):
        if (file := workdir / name).exists():
            found = True
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest() if found else None
