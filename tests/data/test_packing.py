import json
from collections import Counter
from functools import partial
from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data import Example
from attnlab.data.batch import split_example, stack_rows
from attnlab.data.packing import Pack
from attnlab.errors import InputError
from tests.data.toys import assert_equal, segments

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def example(length, number=0):
    """Return a document with unique targets of one byte each."""
    targets = number * 1000 + 1 + np.arange(length)
    return Example(targets - 1, targets, np.ones(length), np.ones(length))


def documents(lengths, row):
    examples = [example(length, number) for number, length in enumerate(lengths)]
    return grain.MapDataset.source(examples).map(partial(split_example, length=row))


@given(length=st.integers(1, 100), row=st.integers(2, 30))
def test_split_example_keeps_each_target_once(length, row):
    pieces = split_example(example(length), row)
    np.testing.assert_array_equal(
        np.concatenate([piece.targets for piece in pieces]), example(length).targets
    )
    assert all(len(piece.tokens) <= row for piece in pieces)
    assert all(after.tokens[0] == before.targets[-1] for before, after in pairwise(pieces))
    if length <= row:
        assert len(pieces) == 1


@given(lengths=LENGTHS, row=st.integers(2, 16), seed=st.none() | st.integers(0, 9), pool=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_rows_are_contiguous_segments_with_each_target_once(lengths, row, seed, pool):
    rows = list(Pack(documents(lengths, row), row, seed=seed, pool=pool))
    seen = Counter()
    for packed in rows:
        batch = stack_rows([packed], 1)
        used = int((packed.segments > 0).sum())
        # Segments 1, 2, 3, ... are contiguous, followed by padding.
        assert set(np.diff(packed.segments[:used])) <= {0, 1}
        assert packed.segments[0] == 1
        assert not any(
            field[used:].any()
            for name, field in packed._asdict().items()
            if field is not None and name != "num_bytes"
        )
        assert packed.num_bytes == used
        for tokens, targets, weights, positions in segments(batch):
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            np.testing.assert_array_equal(targets, tokens + 1)
            assert len(set(targets // 1000)) == 1 or targets[0] % 1000 == 0
            assert weights.all()
            seen.update(targets.tolist())
    expected = [t for number, length in enumerate(lengths) for t in example(length, number).targets.tolist()]
    assert seen == Counter(expected)


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=15, deadline=None)
def test_resume_from_state_repeats_rows(lengths, data):
    pack = Pack(documents(lengths, 12).shuffle(3).repeat(), 12, seed=1, pool=data.draw(st.integers(1, 30)))
    at = data.draw(st.integers(0, 30), label="rows before get_state")
    uninterrupted = iter(pack)
    for _ in range(at):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    resumed = iter(pack)
    for _ in range(data.draw(st.integers(0, 5), label="rows before set_state")):
        next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for _ in range(20):
        assert_equal(next(uninterrupted), next(resumed))


def test_resume_at_end_yields_nothing():
    pack = Pack(documents([3, 4], 8), 8, seed=None)
    iterator = iter(pack)
    assert len(list(iterator)) == 1
    resumed = iter(pack)
    resumed.set_state(iterator.get_state())
    assert list(resumed) == []


def test_equal_lengths_leave_pool_in_order():
    rows = Pack(documents([4] * 500, 16).repeat(), 16, seed=0, pool=100)
    ages = [np.unique(row.targets // 1000) for row, _ in zip(rows, range(100), strict=False)]
    assert len(np.unique(np.concatenate(ages))) > 380


@pytest.mark.parametrize(
    "invalid", [Example([], [], [], []), Example([1, 2], [1], [1, 1], [1, 1])], ids=["empty", "unequal"]
)
def test_invalid_examples_are_rejected(invalid):
    with pytest.raises(InputError, match="tokens"):
        split_example(invalid, 8)


def test_stack_rows_pads_with_empty_rows():
    batch = stack_rows(list(Pack(documents([5], 8), 8, seed=None)), 3)
    assert batch.tokens.shape == (3, 8)
    assert not any(field[1:].any() for field in batch if field is not None)
