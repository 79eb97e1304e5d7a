import json
import subprocess
import sys
import threading
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data import BPE, Data, Words
from attnlab.errors import InputError
from tests.data.toys import Documents, LastWord, assert_equal, segments

POEMS = tuple(f"{i} " * (i % 23 + 1) + "é" * (i % 3) for i in range(70))
POETRY = Documents(documents=POEMS, sequence_length=32, batch_size=4)


def count_targets(batches):
    """Count the targets with positive weight of the batches."""
    return Counter(t for b in batches for t in b.targets[b.weights > 0].tolist())


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), min_size=1, max_size=12),
    length=st.integers(2, 40),
    rows=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_evaluation_has_every_target_once(texts, length, rows):
    data = Documents(documents=tuple(texts), sequence_length=length, batch_size=rows)
    tokenizer = data.build_tokenizer()
    batches = list(data.eval_batches("validation", tokenizer))
    expected = Counter(t for text in texts for t in [*text.encode(), tokenizer.eos_id])
    assert count_targets(batches) == expected
    assert sum(b.num_bytes.sum() for b in batches) == sum(len(text.encode()) for text in texts)
    for batch in batches:
        assert {
            n: (a.shape, a.dtype) for n, a in batch._asdict().items() if a is not None
        } == data.element_spec()


def test_chunks_concatenate_to_document():
    data = Documents(documents=("abcdefghij" * 3,), sequence_length=8)
    tokenizer = data.build_tokenizer()
    (batch,) = data.eval_batches("train", tokenizer)
    pieces = sorted(segments(batch), key=lambda piece: -len(piece[0]))
    assert all(piece[3][0] == 0 for piece in pieces)
    assert pieces[0][0][0] == tokenizer.eos_id
    assert tokenizer.decode(np.concatenate([piece[1] for piece in pieces])) == data.documents[0]


def test_evaluation_does_not_depend_on_number_of_shards():
    tokenizer = POETRY.build_tokenizer()
    whole = list(POETRY.eval_batches("validation", tokenizer))
    shares = [list(POETRY.eval_batches("validation", tokenizer, shard=i, num_shards=2)) for i in (0, 1)]
    assert len(whole) == len(shares[0]) == len(shares[1])
    for batch, *parts in zip(whole, *shares, strict=True):
        assert_equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *parts))


def test_evaluation_limit_and_repetition():
    batches = POETRY.eval_batches("validation", POETRY.build_tokenizer(), limit=2)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)


def test_training_order_is_determined_by_seed():
    tokenizer = POETRY.build_tokenizer()
    runs = [list(islice(POETRY.train_iterator(tokenizer, seed=s), 30)) for s in (5, 5, 6)]
    for a, b in zip(*runs[:2], strict=True):
        assert_equal(a, b)
    assert any((a.tokens != b.tokens).any() for a, b in zip(runs[0], runs[2], strict=True))


def test_epochs_are_complete_and_reshuffled():
    # Each row contains one document, so the rows show the order of the documents.
    data = Documents(documents=tuple(f"{i:07}" for i in range(50)), sequence_length=8, batch_size=1)
    tokenizer = data.build_tokenizer()
    order = [tokenizer.decode(b.targets[0]) for b in islice(data.train_iterator(tokenizer, seed=0), 200)]
    assert order[:50] != order[50:100]
    assert order[:50] != sorted(order[:50])
    # The pool is at most one epoch large, so each document occurs about once per epoch.
    counts = Counter(order)
    assert set(counts) == set(data.documents)
    assert max(counts.values()) <= 5


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_the_rows_of_the_whole_batch(count):
    tokenizer = POETRY.build_tokenizer()
    shards = [
        POETRY.train_iterator(tokenizer, seed=3, batch_size=4, shard=i, num_shards=count)
        for i in range(count)
    ]
    for whole in islice(POETRY.train_iterator(tokenizer, seed=3, batch_size=4), 12):
        assert_equal(whole, jax.tree.map(lambda *x: np.concatenate(x), *map(next, shards)))


def test_state_continues_with_another_number_of_shards():
    tokenizer = POETRY.build_tokenizer()
    whole = POETRY.train_iterator(tokenizer, seed=3, batch_size=4)
    for _ in range(7):
        next(whole)
    shard = POETRY.train_iterator(tokenizer, seed=3, batch_size=4, shard=1, num_shards=2)
    shard.set_state(whole.get_state())
    for expected, actual in zip(islice(whole, 9), islice(shard, 9), strict=True):
        assert_equal(jax.tree.map(lambda x: x[2:], expected), actual)


@pytest.mark.parametrize("at", [0, 1, 7, 40])
def test_resume_from_state_repeats_batches(at):
    tokenizer = POETRY.build_tokenizer()
    uninterrupted = POETRY.train_iterator(tokenizer, seed=1)
    for _ in range(at):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    resumed = POETRY.train_iterator(tokenizer, seed=1)
    resumed.set_state(state)
    for _ in range(40):
        assert_equal(next(uninterrupted), next(resumed))


def test_resume_in_new_process_repeats_batches():
    tokenizer = POETRY.build_tokenizer()
    uninterrupted = POETRY.train_iterator(tokenizer, seed=1)
    for _ in range(9):
        next(uninterrupted)
    program = (
        "import sys, json; from tests.data.test_base import POETRY;"
        "it = POETRY.train_iterator(POETRY.build_tokenizer(), seed=1); it.set_state(json.loads(sys.argv[1]));"
        "print(json.dumps([next(it).tokens.tolist() for _ in range(5)]))"
    )
    command = [sys.executable, "-c", program, json.dumps(uninterrupted.get_state())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [next(uninterrupted).tokens.tolist() for _ in range(5)]


def test_num_batches_repeats_first_batches():
    tokenizer = POETRY.build_tokenizer()
    plain = list(islice(POETRY.train_iterator(tokenizer, seed=2), 3))
    iterator = POETRY.train_iterator(tokenizer, seed=2, num_batches=3)
    for expected in plain * 2:
        assert_equal(next(iterator), expected)
    resumed = POETRY.train_iterator(tokenizer, seed=2, num_batches=3)
    resumed.set_state(iterator.get_state())
    assert_equal(next(resumed), plain[0])


def test_custom_examples_are_packed_unsplit():
    data = LastWord(sequence_length=16, batch_size=2)
    tokenizer = data.build_tokenizer()
    batches = list(data.eval_batches("validation", tokenizer))
    pieces = [piece for batch in batches for piece in segments(batch)]
    assert len(pieces) == data.count
    assert max(batch.segments.max() for batch in batches) > 2
    for tokens, targets, weights, _ in pieces:
        assert weights.tolist() == [0] * (len(tokens) - 1) + [1]
        assert tokenizer.decode(targets[-1:]).startswith("w")
    assert sum(b.num_bytes.sum() for b in batches) == sum(len(f"w{i} ") for i in range(data.count))


def test_full_length_examples_are_not_packed():
    data = LastWord(sequence_length=16, batch_size=2, count=3)
    exact = LastWord(sequence_length=4, batch_size=2, count=3)  # examples of 2, 3, 4 tokens
    tokenizer = data.build_tokenizer()
    assert all(batch.segments.max() <= 1 for batch in exact.eval_batches("train", tokenizer))


def test_unknown_validation_words_are_rejected():
    class Held(Documents):
        def records(self, split):
            return [{"text": "a b" if split == "train" else "a zebra"}]

    held = Held(tokenizer=Words())
    tokenizer = held.build_tokenizer()
    with pytest.raises(InputError, match="'zebra'"):
        list(held.eval_batches("validation", tokenizer))


def test_build_tokenizer_is_deterministic(tmp_path):
    data = Documents(documents=POEMS, tokenizer=BPE(vocab_size=280))
    for name in "ab":
        data.build_tokenizer().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_batch_is_a_pytree():
    batch = next(POETRY.train_iterator(POETRY.build_tokenizer(), seed=0))
    assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(4, 32)] * 5 + [(4,)]


def test_prefetch_changes_threads_but_not_batches():
    tokenizer = POETRY.build_tokenizer()
    for prefetch in (0, 4):
        data = Documents(documents=POEMS, sequence_length=32, batch_size=4, prefetch=prefetch)
        before = set(threading.enumerate())  # includes threads of other tests, which may end at any time
        iterator = data.train_iterator(tokenizer, seed=0)
        batch = next(iterator)
        names = [thread.name for thread in threading.enumerate() if thread not in before]
        assert any("thread-prefetch" in name for name in names) == (prefetch > 0)
        iterator.close()
        assert_equal(batch, next(POETRY.train_iterator(tokenizer, seed=0)))
        assert len(set(threading.enumerate()) - before) <= 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Data(sequence_length=1), "sequence_length must be 2"),
        (lambda: Data(batch_size=0), "batch_size must be 1"),
        (lambda: Data(prefetch=-1), "prefetch must be 0"),
        (lambda: POETRY.train_iterator(None, seed=-1), "seed must be 0"),
        (lambda: POETRY.train_iterator(None, seed=0, num_batches=0), "overfit_batches must be from 1 to "),
        (lambda: POETRY.train_iterator(None, seed=0, num_batches=10**12), "overfit_batches must be from 1"),
        (lambda: POETRY.train_iterator(None, seed=0, num_batches=10**23), "overfit_batches must be from 1"),
        (lambda: Documents(sequence_length=10**9), "sequence_length must be 16777216 or less"),
        (lambda: POETRY.train_iterator(None, seed=0, num_shards=3), "multiple of the 3"),
        (lambda: POETRY.train_iterator(None, seed=0, shard=2, num_shards=2), "shard 2"),
        (lambda: POETRY.eval_batches("dev", None), "unknown split 'dev'"),
        (lambda: Documents().eval_batches("train", None), "train split of Documents is empty"),
    ],
)
def test_invalid_arguments_are_rejected(call, message):
    with pytest.raises(InputError, match=message):
        call()
