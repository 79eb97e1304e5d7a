"""Pack chunks of documents into rows with little padding and a small resumable state.

    pool    [aaaaaaaa] [bbbbb] [cccc] [ddd] [ee] [f] ...     chunks of many documents, refilled
    row     pick one at random: bbbbb, then the longest that still fits, until none fits
            b b b b b d d d         tokens
            1 1 1 1 1 2 2 2         segments
            0 1 2 3 4 0 1 2         positions

The packers of Grain close a group of rows at a time and return them in a burst. A pool has a
constant cost per row, wastes less, and also shuffles the chunks of long documents. The state holds
the origins of the pool's chunks and not the chunks, because reading them again is cheap.
"""

import bisect
import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from attnlab.data.batch import Batch, Example, pack_row, stack_rows
from attnlab.errors import InputError

# The pool is refilled up to the first of these limits. More chunks mix better and leave less
# padding. The tokens bound memory (16 bytes each) and the time to the first batch of long rows.
POOL_CHUNKS = 1024
POOL_TOKENS = 2**18

# Several threads hide the latency of remote storage. Each reads a group of documents at a time,
# because Grain's cost of an element in a thread exceeds that of a small document.
GROUP = 16
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
BATCH_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)  # each is a batch


class RowsOfBatches(grain.MapDataset[Batch]):
    """The given rows of each batch of `size` rows; the others are not read.

    The last batch is filled with empty rows. A position in this data set counts batches, so it does
    not depend on which rows a process reads.
    """

    def __init__(self, rows: grain.MapDataset[Batch], size: int, own: slice):
        super().__init__(rows)
        self._size, self._own = size, own

    def __len__(self) -> int:
        return -(-len(self._parent) // self._size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        first, end = index * self._size, len(self._parent)
        own = range(first + self._own.start, min(first + self._own.stop, end))
        # A shard without rows in the last batch takes the shapes of a row from the first one.
        rows = [self._parent[i] for i in own] or [self._parent[first].map(np.zeros_like)]
        return stack_rows(rows, self._own.stop - self._own.start)


class Pack(grain.IterDataset[Batch]):
    """Rows of `length` tokens packed from documents, each a list of chunks.

    With a `seed`, a row begins with a random chunk of the pool, otherwise with the oldest. Every
    chunk is used once. The pool holds at most `pool` chunks, plus the rest of a document.
    """

    def __init__(
        self,
        documents: grain.MapDataset[list[Example]],
        length: int,
        *,
        seed: int | None,
        pool: int = POOL_CHUNKS,
    ):
        super().__init__(documents.batch(GROUP, batch_fn=list).to_iter_dataset(READ_OPTIONS))
        self._documents = documents
        self._length = length
        self._seed = seed
        self._pool_size = min(pool, POOL_CHUNKS)

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        """Start at the first row."""
        return _PackIterator(iter(self._parent), self._documents, self._length, self._seed, self._pool_size)


class _PackIterator(grain.DatasetIterator[Batch]):
    def __init__(
        self,
        reader: grain.DatasetIterator[list[list[Example]]],
        documents: grain.MapDataset[list[Example]],
        length: int,
        seed: int | None,
        pool_size: int,
    ):
        super().__init__(reader)
        self._reader = reader
        self._documents = documents
        self._length = length
        self._seed = seed
        self._pool_size = pool_size
        self._begin(read=0, row=0)

    def _begin(self, read: int, row: int) -> None:
        group, skipped = divmod(read, GROUP)
        self._reader.set_state({"next_index": group})
        documents = itertools.chain.from_iterable(self._reader)
        self._unread: Iterator[list[Example]] = itertools.islice(documents, skipped, None)
        self._read = read  # documents read so far
        self._row = row  # rows made so far
        self._tokens = 0  # tokens in the pool
        # Sorted by (length, -document, -chunk): among chunks of the same length the oldest is last.
        self._pool: list[tuple[int, int, int]] = []
        self._chunks: dict[tuple[int, int], Example] = {}

    def __next__(self) -> Batch:
        self._refill()
        if not self._pool:
            raise StopIteration
        picked = [self._take(self._first())]
        room = self._length - len(picked[0].tokens)
        while room:
            self._refill()
            longest = bisect.bisect_right(self._pool, (room, 0, 0)) - 1
            if longest < 0:
                break
            picked.append(self._take(longest))
            room -= len(picked[-1].tokens)
        self._row += 1
        return pack_row(picked, self._length)

    def _first(self) -> int:
        if self._seed is None:
            return max(range(len(self._pool)), key=lambda at: self._pool[at][1:])
        return int(np.random.default_rng((self._seed, self._row)).integers(len(self._pool)))

    def _refill(self) -> None:
        while len(self._pool) < self._pool_size and self._tokens < POOL_TOKENS:
            chunks = next(self._unread, None)
            if chunks is None:
                return
            for index, chunk in enumerate(chunks):
                self._put(self._read, index, chunk)
            self._read += 1

    def _put(self, document: int, index: int, chunk: Example) -> None:
        bisect.insort(self._pool, (len(chunk.tokens), -document, -index))
        self._chunks[document, index] = chunk
        self._tokens += len(chunk.tokens)

    def _take(self, at: int) -> Example:
        length, document, index = self._pool.pop(at)
        self._tokens -= length
        return self._chunks.pop((-document, -index))

    def get_state(self) -> dict[str, Any]:
        # A string, because Grain deep-copies the state with every batch, number by number.
        pool = " ".join(f"{-document}:{-index}" for _, document, index in self._pool)
        return {"read": self._read, "row": self._row, "pool": pool}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of `get_state`.

        Raises:
          InputError: the documents have fewer chunks than those of the state.
        """
        self._begin(state["read"], state["row"])
        sources = sorted(tuple(map(int, source.split(":"))) for source in state["pool"].split())
        opened, chunks = -1, []
        for document, index in sources:
            if document != opened:
                opened, chunks = document, self._documents[document]
            if index >= len(chunks):
                raise InputError(
                    f"the data has changed since the checkpoint: document {document} has {len(chunks)} "
                    f"chunks, not {index + 1} or more; resume with --allow_changed_data"
                )
            self._put(document, index, chunks[index])
