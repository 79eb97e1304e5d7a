"""Two helpers that keep the step from waiting for data: encode once, and prefetch."""

import atexit
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from attnlab.data.batch import Batch, Example

# Bytes of encoded documents to keep: small sets are encoded in the first epoch only.
CACHE_BYTES = 2**26


class EncodedExampleCache(Sequence[Example]):
    """Records encoded when asked for, the first `CACHE_BYTES` of them kept."""

    def __init__(self, records: Sequence[Any], encode: Callable[[Any], Example]):
        self._records = records
        self._encode = encode
        self._examples: dict[int, Example] = {}
        self._free_bytes = CACHE_BYTES

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        # Threads may both encode a document; they get the same, and either may be kept.
        if index in self._examples:
            return self._examples[index]
        example = self._encode(self._records[index])
        size = sum(np.asarray(array).nbytes for array in example if array is not None)
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._examples[index] = example
        return example


class Prefetch(grain.IterDataset[Batch]):
    """Up to `size` batches made ahead in a thread, which ends before the interpreter does."""

    def __init__(self, batches: grain.IterDataset[Batch], size: int):
        super().__init__(batches)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        """Start at the first batch."""
        return _PrefetchIterator(iter(self._parent), self._size)


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator[Batch]):
    def __init__(self, batches: grain.DatasetIterator[Batch], size: int):
        super().__init__(batches, size)
        self._ended = False
        _running.add(self)

    def close(self) -> None:
        # Once only: a second call, from Grain's __del__, may come when its modules are gone.
        if not self._ended:
            self._ended = True
            super().close()


_running: weakref.WeakSet[_PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    for iterator in list(_running):
        iterator.close()
