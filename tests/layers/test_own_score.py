"""A score with a learned table and a normalizer in an experiment file outside the project."""

import json
import shutil

import pytest

from tests.programs import ROOT, call, metrics, write_text

FILE = '''"""A decoder or a vision transformer with a score and a normalizer of this file."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from digits import Digits

from attnlab.attention import relative_bias
from attnlab.data import Bytes, Text
from attnlab.layers import AttentionConfig, Bidirectional, Causal, LayerNormalizer, LayerScore
from attnlab.models import DecoderConfig, ViTConfig
from attnlab.train import AdamW, Experiment, Train


@dataclass(frozen=True)
class LearnedTable(LayerScore):
    def score(self, inputs, declare):
        return relative_bias(declare("table", (17, inputs.heads), ("window", "heads")), inputs.offset)


@dataclass(frozen=True)
class Softplus(LayerNormalizer):
    def __call__(self, scores):
        weights = jax.nn.softplus(scores)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        return weights / total, jnp.log(total[..., 0])


def get_config(model="decoder"):
    own = dict(score=LearnedTable(), normalizer=Softplus())
    sizes = dict(depth=2, width=16, attention=AttentionConfig(heads=4))
    train = Train(steps=4, checkpoint_every=2, eval_every=4, eval_batches=1, log_every=1)
    if model == "vit":
        vit = ViTConfig(**sizes, image=(8, 8, 1), patch=(2, 2), pattern=(Bidirectional(**own),))
        return Experiment(model=vit, data=Digits(batch_size=8), optimizer=AdamW(), train=train)
    text = Text(name="text:words.txt", tokenizer=Bytes(), sequence_length=16, batch_size=8)
    decoder = DecoderConfig(**sizes, pattern=(Causal(**own),))
    return Experiment(model=decoder, data=text, optimizer=AdamW(), train=train)


def report(trained):
    maps = trained.attention(trained.batches("validation", limit=1)[0])
    return {"layers": len(maps), "weights_of_a_query": float(maps[0, 0, 0, -1].sum())}
'''


@pytest.mark.parametrize("model", ["decoder", pytest.param("vit", marks=pytest.mark.slow)])
def test_own_score_and_normalizer_train_resume_and_are_described(model, tmp_path, monkeypatch, capfd):
    assert len([line for line in FILE.splitlines() if line.strip()]) < 40
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "words.txt")
    shutil.copy(ROOT / "experiments" / "digits.py", tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    config = f"--config=own.py:{model}"
    assert call(config, "--workdir=run", "--max_steps=2") == 0
    assert call("--workdir=run") == 0
    assert [line["step"] for line in metrics("run", "train")] == [1, 2, 3, 4]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["layers"] == 2 and report["weights_of_a_query"] == pytest.approx(1)
    capfd.readouterr()
    assert call(config, "--mode=describe") == 0
    out = capfd.readouterr().out
    assert "attention/score_LearnedTable/table" in out and "LearnedTable" in out and "Softplus" in out
