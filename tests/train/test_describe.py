"""What is said of an experiment before it runs; and that every field of one does something."""

import dataclasses
import re
from functools import cache

import jax
import numpy as np
import pytest

from attnlab import config as configs
from attnlab.train import flops
from attnlab.train.describe import describe
from attnlab.train.session import Session
from tests.programs import ROOT, write_text
from tests.train.small import TOKENIZER, experiment, session


def test_describe_names_every_parameter_with_its_place():
    made = session(experiment(), "fsdp:4,tensor:2")
    text = describe(made)
    sections = dict(part.split("\n", 1) for part in text.split("\n\n"))
    assert list(sections) == ["mesh", "parameters", "FLOPs a token", "bytes a device", "batch"]
    assert "fsdp:4,tensor:2" in sections["mesh"]
    lines = sections["parameters"].splitlines()
    assert len(lines) == len(jax.tree.leaves(made.abstract_state.params)) + 1
    (row,) = [line.split("  ") for line in lines if "attention/query/kernel" in line]
    row = [cell.strip() for cell in row if cell]
    assert row == ["layers/periods/block0/attention/query/kernel", "(2, 16, 4, 4)", "float32", "P(-, 'fsdp', 'tensor', -)", "512"]  # fmt: skip
    count = sum(x.size for x in jax.tree.leaves(made.abstract_state.params))
    assert lines[-1].split()[-1] == f"{count:,}"
    counted = flops.token_flops(made.experiment.model, 257, 16)
    assert f"{counted.training:,.0f}" in sections["FLOPs a token"]
    assert re.search(r"activations and temporaries +[\d.,]+ [KM]iB", sections["bytes a device"])
    assert "(8, 16)" in sections["batch"]


# Every field matters ------------------------------------------------------------------------------------

DEFAULT = configs.load(str(ROOT / "experiments" / "lm_docs.py")).config

# Another valid value of each field of the default experiment, and where the difference shows: in the
# "step" (its lowered text), the "state" it starts from, the "batches", or the "loop".
CHANGES = {
    "model": None,
    "model.depth": ("3", "step"),
    "model.width": ("128", "step"),
    "model.attention": None,
    "model.attention.heads": ("4", "step"),
    "model.attention.kv_heads": ("2", "step"),
    "model.attention.head_dim": ("16", "step"),
    "model.attention.bias": ("true", "step"),
    "model.attention.qk_norm": ("true", "step"),
    "model.attention.softcap": ("20.0", "step"),
    "model.attention.dropout": ("0.1", "step"),
    "model.feed_forward": ("MLP", "step"),
    "model.feed_forward.width": ("64", "step"),
    "model.feed_forward.activation": ("relu", "step"),
    "model.feed_forward.bias": ("true", "step"),
    "model.norm": ("LayerNorm", "step"),
    "model.norm.epsilon": ("0.01", "step"),
    "model.norm.bias": ("true", "step"),
    "model.positions": ("NoPositions", "step"),
    "model.positions.theta": ("500.0", "step"),
    "model.positions.fraction": ("0.5", "step"),
    "model.pattern": ("(Sliding(window=4),)", "step"),
    "model.tied": ("false", "step"),
    "model.logit_softcap": ("30.0", "step"),
    "model.dropout": ("0.1", "step"),
    "model.init": ("MuP", "step"),
    "model.init.std": ("0.1", "state"),
    "model.dtypes": None,
    "model.dtypes.param": ("bfloat16", "step"),
    "model.dtypes.compute": ("bfloat16", "step"),
    "model.dtypes.logits": ("bfloat16", "step"),
    "model.remat": ("full", "step"),
    "model.scan": ("false", "step"),
    "data": None,
    "data.tokenizer": ("Bytes", "batches"),
    "data.tokenizer.vocab_size": ("257", "batches"),
    "data.sequence_length": ("32", "batches"),
    "data.batch_size": ("4", "batches"),
    "data.name": ("text:{other}", "batches"),
    "optimizer": ("Lion", "step"),
    "optimizer.learning_rate": ("0.5", "step"),
    "optimizer.schedule": ("Constant", "step"),
    "optimizer.schedule.warmup": ("7", "step"),
    "optimizer.schedule.decay": ("0.9", "step"),
    "optimizer.schedule.final": ("0.5", "step"),
    "optimizer.weight_decay": ("0.5", "step"),
    "optimizer.clip_norm": ("0.25", "step"),
    "optimizer.rules": ("()", "step"),
    "optimizer.b1": ("0.5", "step"),
    "optimizer.b2": ("0.5", "step"),
    "optimizer.epsilon": ("0.001", "step"),
    "loss": None,
    "loss.label_smoothing": ("0.1", "step"),
    "loss.z_loss": ("0.1", "step"),
    "train": None,
    "train.steps": ("77", "step"),  # by the schedule
    "train.microbatches": ("2", "step"),
    "train.ema": ("0.9", "step"),
    "train.spike_skip": ("SpikeSkip", "step"),
    "seed": ("1", "state"),
}
ELSEWHERE = {
    "data.prefetch": "makes the same batches sooner; its size is tested with the data",
    **dict.fromkeys(
        ("train.log_every", "train.eval_every", "train.checkpoint_every"), "the loop's: test_loop.py"
    ),
    "train.eval_batches": "how much the runner reads: test_run.py",
    "train.keep": "the checkpoints': test_checkpoints.py",
}


def test_every_field_is_in_the_table():
    assert set(configs.flatten(DEFAULT)) == set(CHANGES) | set(ELSEWHERE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The default experiment made small, of a text of its own, and the path of another text."""
    folder = tmp_path_factory.mktemp("texts")
    text, other = write_text(folder / "a.txt"), write_text(folder / "b.txt", seed=1)
    small = [
        *(("model.width", "64"), ("model.depth", "2"), ("data.sequence_length", "16"), ("data.batch_size", "8")),
        *(("data.name", f"text:{text}"), ("data.tokenizer.vocab_size", "300")),
    ]  # fmt: skip
    return configs.override_all(DEFAULT, small), other


def step_text(e):
    made = Session(e, session(e).mesh, TOKENIZER)
    with jax.set_mesh(made.mesh):
        from attnlab.train.step import make_train_step

        step = make_train_step(made.model, e, made.optimizer)
        return jax.jit(step).lower(made.abstract_state, made.abstract_batch).as_text()


def start(e):
    state = session(e).new_state()
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])


def first_batch(e):
    tokenizer = e.data.build_tokenizer()
    batch = next(e.data.train_iterator(tokenizer, seed=e.seed))
    return batch.tokens


@cache
def as_it_is(e, seen):
    return LOOKS[seen](e)


LOOKS = {"step": step_text, "state": start, "batches": first_batch}


@pytest.mark.parametrize("field", [name for name, change in CHANGES.items() if change])
def test_a_field_that_is_changed_changes_something(base, field):
    e, other = base
    text, seen = CHANGES[field]
    changed = configs.override(e, field, text.format(other=other))
    assert configs.differences(e, changed)
    before, after = as_it_is(e, seen), LOOKS[seen](changed)
    assert not np.array_equal(before, after)


def test_a_field_that_is_not_changed_changes_nothing(base):
    """Else the test above would prove nothing."""
    e, _ = base
    for seen, look in LOOKS.items():
        assert np.array_equal(as_it_is(e, seen), look(dataclasses.replace(e)))
