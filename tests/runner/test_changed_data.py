"""A resumed run compares its data with that of its start."""

import json

import pytest
from etils import epath

from attnlab.data import Bytes, Text, Words
from attnlab.errors import InputError
from attnlab.runner.changed_data import FINGERPRINT, TOKENIZER, DataRecord, compare, set_position


@pytest.fixture
def run(tmp_path):
    """Return the workdir and the data of a run that has started."""
    (tmp_path / "words.txt").write_text("the cat sat on the mat\n" * 2000)
    data = Text(name=f"text:{tmp_path}/*.txt", tokenizer=Bytes(), sequence_length=16)
    workdir = epath.Path(tmp_path / "run")
    tokenizer = data.build_tokenizer()
    now = DataRecord.of(data, tokenizer, workdir)
    workdir.mkdir()
    tokenizer.save(workdir / TOKENIZER)
    now.save(workdir)
    return workdir, data, tokenizer


def test_same_data_resumes_at_its_position(run):
    workdir, data, tokenizer = run
    record = compare(workdir, DataRecord.of(data, tokenizer, workdir), 2, allowed=False)
    assert record.changed_at is None
    batches, straight = (data.train_iterator(tokenizer, seed=0) for _ in range(2))
    next(straight)
    set_position(batches, straight.get_state(), 2, record, allowed=False)
    assert (next(batches).tokens == next(straight).tokens).all()


@pytest.mark.parametrize("size", [45999, 46000, 50000, 200], ids=["byte less", "byte", "grown", "shrunk"])
def test_changed_data_is_refused_or_starts_again(run, refuses, capsys, size):
    workdir, data, tokenizer = run
    straight = data.train_iterator(tokenizer, seed=0)
    next(straight)
    position = straight.get_state()
    file = workdir.parent / "words.txt"
    file.write_text((file.read_text() + "more\n" * 1000).replace("cat", "cot", 1)[:size])
    now = DataRecord.of(data, tokenizer, workdir)
    with refuses("'words.txt' has changed", "--allow_changed_data", str(workdir)):
        compare(workdir, now, 2, allowed=False)
    record = compare(workdir, now, 2, allowed=True)
    batches = data.train_iterator(tokenizer, seed=0)
    set_position(batches, position, 2, record, allowed=True)
    assert "starts again at its first batch" in capsys.readouterr().out
    assert (next(batches).tokens == next(data.train_iterator(tokenizer, seed=0)).tokens).all()
    record.save(workdir)
    # A kill before the next checkpoint: the position of checkpoint 2 is still that of other data.
    again = compare(workdir, DataRecord.of(data, tokenizer, workdir), 2, allowed=False)
    assert again.changed_at == 2
    set_position(batches, position, 2, again, allowed=False)
    # The position of a later checkpoint is of the new data.
    set_position(batches, batches.get_state(), 3, again, allowed=False)
    assert "starts again" in capsys.readouterr().out


def test_changed_tokenizer_is_refused(run, refuses):
    workdir, data, tokenizer = run
    Words().train(["the cat"]).save(workdir / TOKENIZER)
    with refuses("tokenizer.json has changed"):
        compare(workdir, DataRecord.of(data, tokenizer, workdir), 2, allowed=False)


def test_run_without_fingerprint_resumes_or_names_the_change(run, refuses, capsys):
    """Runs of earlier versions have none; positions beyond the data are still found."""
    workdir, data, tokenizer = run
    straight = data.train_iterator(tokenizer, seed=0)
    next(straight)
    position = straight.get_state()
    (workdir / FINGERPRINT).unlink()
    (workdir.parent / "words.txt").write_text("short\n" * 30)
    record = compare(workdir, DataRecord.of(data, tokenizer, workdir), 2, allowed=False)
    batches = data.train_iterator(tokenizer, seed=0)
    with refuses("the data has changed since the checkpoint", "--allow_changed_data"):
        set_position(batches, position, 2, record, allowed=False)
    batches = data.train_iterator(tokenizer, seed=0)
    set_position(batches, position, 2, record, allowed=True)
    next(batches)
    assert "starts again at its first batch" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "{}", '{"data": {}, "tokenizer": "", "changed_at": 1}'])
def test_damaged_fingerprint_is_named(run, text):
    workdir, _, _ = run
    (workdir / FINGERPRINT).write_text(text)
    with pytest.raises(InputError, match="data_fingerprint.json is damaged"):
        DataRecord.load(workdir)


def test_fingerprint_has_its_coverage(run):
    workdir, _, _ = run
    assert json.loads((workdir / FINGERPRINT).read_text())["data"]["coverage"] == "full"
