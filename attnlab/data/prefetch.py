"""A cache of encoded examples and a prefetching iterator."""

import atexit
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from attnlab.data.batch import Batch, Example

# Bytes of cached encoded documents: small sets are encoded in the first epoch only.
CACHE_BYTES = 2**26


class EncodedExampleCache(Sequence[Example]):
    """Lazily encoded records, with a cache of `CACHE_BYTES` bytes for the first ones."""

    def __init__(self, records: Sequence[Any], encode: Callable[[Any], Example]):
        self._records = records
        self._encode = encode
        self._examples: dict[int, Example] = {}
        self._free_bytes = CACHE_BYTES

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        # Two threads may encode the same document; the results are equal, and either is cached.
        if index in self._examples:
            return self._examples[index]
        example = self._encode(self._records[index])
        size = sum(np.asarray(array).nbytes for array in example if array is not None)
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._examples[index] = example
        return example


class Prefetch(grain.IterDataset[Batch]):
    """Up to `size` batches prepared ahead in a thread that ends before the interpreter."""

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
        # Only once: Grain's __del__ may call it again after its modules are unloaded.
        if not self._ended:
            self._ended = True
            super().close()


_running: weakref.WeakSet[_PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    for iterator in list(_running):
        iterator.close()
