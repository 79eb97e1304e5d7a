"""`Data`: the base class of data sets, with the input pipeline that they share."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np
from etils import epath

from attnlab.data import batch as batching
from attnlab.data.batch import Batch, Example
from attnlab.data.packing import BATCH_READ_OPTIONS, POOL_CHUNKS, Pack, RowsOfBatches
from attnlab.data.prefetch import EncodedExampleCache, Prefetch
from attnlab.data.tokenizer import BPE, Bytes, Tokenizer, Words
from attnlab.errors import InputError
from attnlab.paths import absolute

SPLITS = ("train", "validation")
LONGEST_ROW = 2**24  # tokens; longer rows exceed the memory of any machine
OVERFIT_BYTES = 2**30  # memory of the batches that `num_batches` repeats


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set with its batching. Override `records`, and `encode` unless it is plain text.

    Raises:
      InputError: a value is out of range.
    """

    path_fields: ClassVar[tuple[str, ...]] = ()
    """Names of path fields. Relative paths become absolute, from the current folder."""

    tokenizer: Bytes | BPE | Words = BPE()  # noqa: RUF009 - frozen, so safe to share
    """The tokenizer that is trained on the training split."""
    sequence_length: int = 256
    """Tokens per row."""
    batch_size: int = 8
    """Rows of a global batch, over all processes."""
    prefetch: int = 4
    """Batches prepared ahead of the step; 0 prepares them in the thread of the step."""

    def __post_init__(self) -> None:
        for name in self.path_fields:
            object.__setattr__(self, name, absolute(getattr(self, name)))
        for name, least in {
            "sequence_length": 2 if self.packs else 1,
            "batch_size": 1,
            "prefetch": 0,
        }.items():
            if getattr(self, name) < least:
                raise InputError(f"data.{name} must be {least} or more, not {getattr(self, name)}")
        if self.sequence_length > LONGEST_ROW:
            raise InputError(
                f"data.sequence_length must be {LONGEST_ROW} or less, not {self.sequence_length}"
            )

    def records(self, split: str) -> Sequence[Any]:
        """Return the records of "train" or "validation", with `len` and `[i]`. Override this."""
        raise NotImplementedError(f"{type(self).__name__} must define records(split)")

    def files(self) -> Mapping[str, epath.PathLike]:
        """Return the files that `records` reads, by name, to notice changes when a run resumes.

        The default is the files that `path_fields` name, and all files of their folders. Without
        files, the records are compared.
        """
        found: dict[str, epath.PathLike] = {}
        for field in self.path_fields:
            path = Path(getattr(self, field))
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            found |= {os.path.relpath(file, path.parent): file for file in inside if file.is_file()}
        return found

    def text(self, record: Any) -> str:
        """Return the text of a record, for training the tokenizer and for `encode`."""
        return record["text"]

    def encode(self, record: Any, tokenizer: Tokenizer) -> Example:
        """Return a record as an example. The default predicts each next token, then the end."""
        start = tokenizer.prefix_tokens
        own = np.append(tokenizer.encode(self.text(record)), tokenizer.eos_id).astype(np.int32)
        stream = np.concatenate([start, own]).astype(np.int32)
        before = np.zeros(len(start) - 1)  # a prefix token may be outside the tokenizer's vocabulary
        weights, sizes = (np.append(before, x) for x in (np.ones(len(own)), tokenizer.token_bytes[own]))
        return Example(stream[:-1], stream[1:], weights.astype(np.float32), sizes)

    @property
    def source_shape(self) -> tuple[int, ...] | None:
        """The largest shape of the source of an example; None without sources. Override this."""
        return None

    @property
    def preprocessor(self) -> Mapping[str, Any] | None:
        """The content of `preprocessor_config.json` for sources; None to write no file."""
        return None

    @property
    def packs(self) -> bool:
        """Whether examples share rows and are split if too long. False if examples have sources."""
        return self.source_shape is None

    def build_tokenizer(self) -> Tokenizer:
        """Train the tokenizer on the training split only, with the same result in every process."""
        return self.tokenizer.train(self._training_texts())

    def train_iterator(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int,
        batch_size: int | None = None,
        shard: int = 0,
        num_shards: int = 1,
        num_batches: int | None = None,
    ) -> grain.DatasetIterator[Batch]:
        """Return an endless iterator over the rows of one shard of each batch.

        Each epoch has a new order. `get_state()` returns a small dict of numbers, from which
        `set_state()` continues with the same bits, also with another number of shards. Rows are
        packed in every shard, since a packed row depends on those before it; rows of one example
        are read only where they belong.

        Args:
          tokenizer: encodes the text.
          seed: determines the order.
          batch_size: rows of a global batch; None means `self.batch_size`.
          shard: index of the contiguous part of each batch's rows.
          num_shards: number of parts.
          num_batches: repeat that number of batches; None means all data.
        """
        rows = self._shard(batch_size, shard, num_shards)
        if seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        documents = self._documents("train", tokenizer)
        # Grain adds the epoch to the seed: without mixing, seed 1 would begin with the second epoch
        # of seed 0.
        shuffle_seed, pick_seed = map(int, np.random.SeedSequence((seed, 0)).generate_state(2))
        stream = documents.shuffle(shuffle_seed).repeat()
        # At most one epoch in the pool; otherwise a small set is sampled as if with replacement.
        pool = min(len(documents), POOL_CHUNKS)
        batches = self._batches(stream, rows, num_shards, seed=pick_seed, pool=pool)
        if num_batches is not None:
            spec = self.element_spec(rows.stop - rows.start)
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())
            most = max(1, OVERFIT_BYTES // size)
            if not 1 <= num_batches <= most:
                allowed = f"from 1 to {most}, since {size:,} bytes of memory hold each batch"
                raise InputError(f"overfit_batches must be {allowed}, not {num_batches}")
            first = list(itertools.islice(batches, num_batches))
            batches = grain.MapDataset.source(first).repeat().to_iter_dataset()
        return iter(self._prefetched(batches))

    def eval_batches(
        self,
        split: str,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        shard: int = 0,
        num_shards: int = 1,
        limit: int | None = None,
    ) -> Iterable[Batch]:
        """Return one shard of the rows of the batches of a split, in fixed order.

        Every target occurs once. Empty rows fill the last batch, so that all batches have the same
        shape and every shard has the same number of batches. There are at most `limit` batches.
        Iterating again restarts. See `train_iterator` for the other arguments.
        """
        rows = self._shard(batch_size, shard, num_shards)
        batches = self._batches(self._documents(split, tokenizer), rows, num_shards, seed=None)
        if limit is not None:
            batches = grain.experimental.LimitIterDataset(batches, count=limit)
        return self._prefetched(batches)

    def element_spec(self, batch_size: int | None = None) -> batching.Spec:
        """Return name, shape and dtype of each array of a global batch."""
        size = batch_size or self.batch_size
        return batching.batch_spec(size, self.sequence_length, self.source_shape, self.packs)

    def _training_texts(self) -> Iterator[str]:
        records = self.records("train")
        # Shuffled, so that the first texts are a fair sample of a large set.
        for index in grain.MapDataset.range(len(records)).shuffle(seed=0):
            yield self.text(records[index])

    def _batches(
        self,
        documents: grain.MapDataset[Example],
        rows: slice,
        num_shards: int,
        *,
        seed: int | None,
        pool: int = POOL_CHUNKS,
    ) -> grain.IterDataset[Batch]:
        """Return the given rows of each global batch; the last batch is filled with empty rows."""
        length, size = self.sequence_length, (rows.stop - rows.start) * num_shards
        if not self.packs:
            row = partial(batching.unpacked_row, length=length, source_shape=self.source_shape)
            return RowsOfBatches(documents.map(row), size, rows).to_iter_dataset(BATCH_READ_OPTIONS)
        chunks = documents.map(partial(batching.split_example, length=length))
        batches = Pack(chunks, length, seed=seed, pool=pool).batch(
            size, drop_remainder=False, batch_fn=partial(batching.stack_rows, num_rows=size)
        )
        return batches if num_shards == 1 else batches.map(lambda batch: batch.map(lambda x: x[rows]))

    def _documents(self, split: str, tokenizer: Tokenizer) -> grain.MapDataset[Example]:
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; there are {' and '.join(SPLITS)}")
        records = self.records(split)
        if not len(records):
            raise InputError(f"the {split} split of {type(self).__name__} is empty")
        encoded = EncodedExampleCache(records, lambda record: self.encode(record, tokenizer))
        return grain.MapDataset.source(encoded)

    def _shard(self, batch_size: int | None, shard: int, num_shards: int) -> slice:
        """Return the rows of a shard in each global batch."""
        size = self.batch_size if batch_size is None else batch_size
        if size < 1 or size % num_shards:
            raise InputError(f"batch size {size} is not a positive multiple of the {num_shards} shards")
        if not 0 <= shard < num_shards:
            raise InputError(f"shard {shard} is not below num_shards {num_shards}")
        rows = size // num_shards
        return slice(shard * rows, (shard + 1) * rows)

    def _prefetched(self, batches: grain.IterDataset[Batch]) -> grain.IterDataset[Batch]:
        return Prefetch(batches, self.prefetch)
