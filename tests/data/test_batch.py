"""Batches of examples with source inputs, one example per row."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from attnlab.data import Bytes, Data, Example

TOKENIZER = Bytes().train([])


@dataclass(frozen=True, kw_only=True)
class Toy(Data):
    """Data whose example i has i % 3 + 1 tokens and a source of length i % 4 + 1."""

    tokenizer: Bytes = Bytes()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 3
    batch_size: int = 4
    shape: tuple[int, ...] | None = (4,)
    packed: bool = False

    @property
    def source_shape(self):
        return self.shape

    @property
    def packs(self):
        return self.packed

    def records(self, split):
        return range(10)

    def text(self, record):
        return "a"

    def encode(self, record, tokenizer):
        ones = np.ones(record % 3 + 1, int)
        source = None if self.shape is None else np.full((record % 4 + 1, *self.shape[1:]), record + 1)
        return Example(record * ones, record * ones, ones, ones, source)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3), None])
def test_each_row_is_one_example(shape):
    data = Toy(shape=shape)
    batches = list(data.eval_batches("validation", TOKENIZER))
    spec = data.element_spec()
    for batch in batches:
        shapes = {name: (a.shape, a.dtype) for name, a in batch._asdict().items() if a is not None}
        assert shapes == spec
    rows = [batch.map(lambda x, i=i: x[i]) for batch in batches for i in range(4)]
    assert len(rows) == 12  # ten examples, padded to three batches of four rows
    for i, row in enumerate(rows):
        tokens, targets, weights, segments, positions, num_bytes, values, valid, length, source_length = row
        n = i % 3 + 1 if i < 10 else 0
        np.testing.assert_array_equal(tokens, targets)
        np.testing.assert_array_equal(tokens, [i] * n + [0] * (3 - n))
        np.testing.assert_array_equal(weights, segments)
        np.testing.assert_array_equal(segments, [1] * n + [0] * (3 - n))
        np.testing.assert_array_equal(positions, [*range(n), *[0] * (3 - n)])
        assert num_bytes == length == n
        if shape is not None:
            s = i % 4 + 1 if i < 10 else 0
            assert source_length == s
            np.testing.assert_array_equal(valid, [1] * s + [0] * (4 - s))
            assert values.dtype == (np.int32 if len(shape) == 1 else np.float32)
            assert (values[:s] == i + 1).all() and not values[s:].any()


@pytest.mark.parametrize("shape", [(4,), None])
def test_resume_repeats_batches(shape):
    data = Toy(shape=shape)
    uninterrupted = data.train_iterator(TOKENIZER, seed=1)
    for _ in range(5):
        next(uninterrupted)
    state, expected = uninterrupted.get_state(), [next(uninterrupted) for _ in range(5)]
    resumed = data.train_iterator(TOKENIZER, seed=1)
    resumed.set_state(state)
    for batch in expected:
        for actual, wanted in zip(next(resumed), batch, strict=True):
            np.testing.assert_array_equal(actual, wanted)
    assert len({batch.tokens.tobytes() for batch in expected}) > 1


@pytest.mark.parametrize("size, count", [(4, 2), (6, 3)])
def test_shards_split_a_batch(size, count):
    data = Toy(batch_size=size)
    options = [{"shard": i, "num_shards": count} for i in range(count)]
    whole = list(data.eval_batches("validation", TOKENIZER))
    shards = [list(data.eval_batches("validation", TOKENIZER, **o)) for o in options]
    for batch, *parts in zip(whole, *shards, strict=True):
        for name, expected in batch._asdict().items():
            np.testing.assert_array_equal(expected, np.concatenate([part._asdict()[name] for part in parts]))
    iterators = [data.train_iterator(TOKENIZER, seed=1, **o) for o in options]
    for batch in islice(data.train_iterator(TOKENIZER, seed=1), 5):
        sources = [next(iterator).source for iterator in iterators]
        np.testing.assert_array_equal(batch.source, np.concatenate(sources))


def test_shard_reads_only_its_own_records():
    class Counting(Toy):
        def encode(self, record, tokenizer):
            read.append(record)
            return super().encode(record, tokenizer)

    read = []
    list(Counting(batch_size=4).eval_batches("validation", TOKENIZER, shard=1, num_shards=4))
    whole, read = read, []
    list(Counting(batch_size=4).eval_batches("validation", TOKENIZER))
    assert 0 < len(whole) <= len(read) // 4 + 1


def test_oversized_examples_are_rejected(refuses):
    with refuses("3 tokens", "data.sequence_length=2"):
        list(Toy(sequence_length=2).eval_batches("validation", TOKENIZER))
    with refuses("a source of (4,)", "the largest is (3,)"):
        list(Toy(shape=(3,)).eval_batches("validation", TOKENIZER))
