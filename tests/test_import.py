"""Import a Hugging Face checkpoint into a run, train it and export it, by the command line."""

import json
import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from attnlab import config as configs
from attnlab.data import BPE
from attnlab.models import GenerationDefaults
from attnlab.pretrained import import_export
from attnlab.runner import sessions
from attnlab.runner.request import Request
from tests.pretrained.small_llama import LLAMA, write
from tests.programs import ROOT, call, metrics, write_text

FINE = f"--config={ROOT / 'experiments' / 'finetune.py'}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a checkpoint, a text and a run imported from the checkpoint."""
    folder = tmp_path_factory.mktemp("place")
    write(epath.Path(folder) / "llama")
    text = write_text(folder / "words.txt")
    small = [f"--config.data.name=text:{text}", "--config.data.sequence_length=32", "--config.train.steps=4"]
    assert (
        call("--mode=import", FINE, f"--checkpoint={folder / 'llama'}", f"--workdir={folder / 'run'}", *small)
        == 0
    )
    return folder, small


def test_export_of_imported_run_repeats_checkpoint(place, tmp_path, capfd):
    folder, _ = place
    out = tmp_path / "again"
    assert call("--mode=export", f"--workdir={folder / 'run'}", f"--output_dir={out}") == 0
    assert f"exported step 0 to {out}" in capfd.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (folder / "llama").iterdir())
    before, after = (load_file(p / "model.safetensors") for p in (folder / "llama", out))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert json.loads((out / "config.json").read_text()) == LLAMA | {"dtype": "float32"}


def test_imported_run_is_sampled_and_described(place, capfd):
    run = f"--workdir={place[0] / 'run'}"
    capfd.readouterr()
    assert call("--mode=sample", run, "--prompt=the cat", "--max_new_tokens=4") == 0
    assert capfd.readouterr().out.startswith("the cat")
    assert call("--mode=describe", run) == 0
    out = capfd.readouterr().out
    assert "step 0" in out and "readout/table" in out


@pytest.mark.slow
def test_speculative_decoding_keeps_greedy_samples(place, capfd):
    """Greedy decoding with draft tokens from prompt lookup, a run and a checkpoint."""
    folder, _ = place
    texts = set()
    greedy = ["--prompt=the cat", "--max_new_tokens=12", "--temperature=0"]
    for speculation in (
        [],
        ["--prompt_lookup_ngram=1", "--num_speculative_tokens=2"],
        [f"--draft_model={folder / 'run'}"],
        [f"--draft_model={folder / 'llama'}"],
    ):
        capfd.readouterr()
        assert call("--mode=sample", f"--workdir={folder / 'run'}", *greedy, *speculation) == 0
        texts.add(capfd.readouterr().out)
    assert len(texts) == 1
    assert call("--mode=sample", f"--workdir={folder / 'run'}", "--draft_model=nowhere") == 2
    assert "no checkpoint at nowhere" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["single", "data:2,fsdp:2,tensor:2"])
def test_training_changes_exported_tensors(place, tmp_path, mesh, capfd):
    """Training changes every tensor but the frozen one, and the loss improves on the checkpoint."""
    folder, small = place
    run, out = f"--workdir={tmp_path / 'run'}", tmp_path / "out"
    optimizer = [
        "--config.optimizer.learning_rate=0.01",
        "--config.optimizer.schedule.warmup=1",
        """--config.optimizer.rules=(Rule("embedding",learning_rate=0.0),)""",
        f"--mesh={mesh}",
    ]
    assert call(FINE, f"--config.init={folder / 'llama'}", run, *small, *optimizer) == 0
    printed = capfd.readouterr().out
    assert "claim holds: loss below the checkpoint's: " in printed
    assert len(metrics(tmp_path / "run", "train")) >= 1
    assert call("--mode=export", run, f"--output_dir={out}") == 0
    before, after = (load_file(p / "model.safetensors") for p in (folder / "llama", out))
    assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}
    assert [n for n in before if (before[n] == after[n]).all()] == ["model.embed_tokens.weight"]


@pytest.mark.slow
def test_lora_resumes_and_is_merged_on_export(place, tmp_path, capfd):
    folder, small = place
    options = [f"--config.init={folder / 'llama'}", "--config.lora=LoRA(4,8.0)"]
    options += ["--config.optimizer.learning_rate=0.01", "--config.optimizer.schedule.warmup=1", *small]
    written = []
    for name, stops in (("straight", [4]), ("stopped", [2, 4])):
        for stop in stops:
            assert call(FINE, *options, f"--workdir={tmp_path / name}", f"--max_steps={stop}") == 0
        out = tmp_path / f"{name}-out"
        assert call("--mode=export", f"--workdir={tmp_path / name}", f"--output_dir={out}") == 0
        written.append(load_file(out / "model.safetensors"))
    before = load_file(folder / "llama" / "model.safetensors")
    assert before.keys() == written[0].keys() == written[1].keys()
    for name, x in written[0].items():
        np.testing.assert_array_equal(x, written[1][name], err_msg=name)
        assert np.array_equal(x, before[name]) != name.endswith(("q_proj.weight", "v_proj.weight")), name
    capfd.readouterr()
    assert call("--mode=sample", f"--workdir={tmp_path / 'stopped'}", "--max_new_tokens=2") == 0


def test_imported_run_is_sampled_without_its_checkpoint(place, tmp_path):
    folder, _ = place
    os.rename(folder / "llama", folder / "away")
    try:
        assert (
            call(f"--workdir={folder / 'run'}", "--mode=eval") == 2
        )  # its report compares with the checkpoint
        assert call(f"--workdir={folder / 'run'}", "--mode=sample", "--max_new_tokens=2") == 0
    finally:
        os.rename(folder / "away", folder / "llama")


@pytest.mark.slow
def test_import_of_exported_run_repeats_samples(place, tmp_path, capfd):
    """Importing an exported run gives the same model and tokenizer."""
    _, small = place
    run, out = f"--workdir={tmp_path / 'run'}", tmp_path / "out"
    tiny = ["--config.model.depth=3", "--config.model.width=16", "--config.model.attention.heads=4"]
    tiny += [
        "--config.model.attention.kv_heads=2",
        "--config.model.pattern=Sliding(8),",
        "--max_steps=2",
    ]
    assert call(f"--config={ROOT / 'experiments' / 'lm_docs.py'}", run, *tiny, *small) == 0
    assert call("--mode=export", run, f"--output_dir={out}") == 0
    fields = json.loads((out / "config.json").read_text())
    assert (fields["model_type"], fields["max_position_embeddings"]) == ("mistral", 32)
    again = f"--workdir={tmp_path / 'again'}"
    assert call("--mode=import", FINE, f"--checkpoint={out}", again, *small) == 0
    texts = []
    for place in (run, again):
        capfd.readouterr()
        assert call("--mode=sample", place, "--prompt=the cat", "--max_new_tokens=8", "--temperature=0") == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.long
def test_image_classifier_exports_preprocessor_and_labels(tmp_path, capfd):
    """The exported checkpoint contains the class names; importing it needs no tokenizer file."""
    pytest.importorskip("sklearn")
    digits = f"--config={ROOT / 'experiments' / 'digits.py'}"
    run, out, back, again = (tmp_path / name for name in ("run", "out", "back", "again"))
    assert (
        call(
            digits, f"--workdir={run}", "--config.model.depth=1", "--config.model.width=32", "--fast_dev_run"
        )
        == 0
    )
    assert call("--mode=export", f"--workdir={run}", f"--output_dir={out}") == 0
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == ["ViTForImageClassification"]
    assert fields["id2label"] == {"0": "<eos>"} | {str(i + 1): str(i) for i in range(10)}
    prepared = json.loads((out / "preprocessor_config.json").read_text())
    assert (prepared["size"], prepared["rescale_factor"]) == ({"height": 8, "width": 8}, 1 / 16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    assert call("--mode=import", digits, f"--checkpoint={out}", f"--workdir={back}") == 0
    assert call("--mode=export", f"--workdir={back}", f"--output_dir={again}") == 0
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in out.iterdir())
    before, after = (load_file(p / "model.safetensors") for p in (out, again))
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    fields["id2label"] = {"0": "cat"}
    (out / "config.json").write_text(json.dumps(fields))
    capfd.readouterr()
    assert call("--mode=import", digits, f"--checkpoint={out}", f"--workdir={tmp_path / 'none'}") == 2
    assert "model.classes=1 is less than the 11 words of the tokenizer" in capfd.readouterr().err


def test_translation_batches_begin_with_prefix_tokens(tmp_path):
    """Targets begin with the prefix tokens of the checkpoint, and sources end with `eos`."""
    translate = ROOT / "experiments" / "translate.py"
    tokenizer = BPE(300).train(["the cat"])
    model = replace(
        configs.load(str(translate)).config.model, generation=GenerationDefaults(7, (9,))
    ).with_vocab_size(tokenizer.vocab_size)
    model = replace(model, **{h: replace(getattr(model, h), width=16) for h in ("encoder", "decoder")})
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), import_export.abstract_params(model))
    folder = epath.Path(tmp_path) / "marian"
    import_export.write_checkpoint(folder, model, params, import_export.FromScratch(tokenizer, 32))
    loaded = configs.load(str(translate))
    data = replace(loaded.config.data, sequence_length=128, source_length=128)
    model = import_export.read_config(folder)[1]
    experiment = replace(loaded.config, init=str(folder), model=model, data=data)
    session = sessions.open_session(Request("train", loaded, experiment, {}), experiment)
    (batch,) = experiment.data.eval_batches("validation", session.tokenizer, limit=1)
    assert batch.tokens[:, :2].tolist() == [[7, 9]] * len(batch.tokens)
    ends = batch.source_segments.sum(axis=1) - 1
    assert (batch.source[np.arange(len(ends)), ends] == tokenizer.eos_id).all()
    assert session.tokenizer.encode_source("the") == tokenizer.encode_source("the")


def test_export_of_unsupported_model_is_rejected(place, tmp_path, capfd):
    _, small = place
    run = f"--workdir={tmp_path / 'run'}"
    odd = ["--config.model.width=16", "--config.model.attention=Attention(4,softcap=5.0)", "--max_steps=1"]
    assert call(f"--config={ROOT / 'experiments' / 'lm_docs.py'}", run, *odd, *small) == 0
    capfd.readouterr()
    assert call("--mode=export", run, f"--output_dir={tmp_path / 'out'}") == 2
    message = "express this model; the closest is llama, which would need attention.softcap: 5.0 -> None\n"
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_import_killed_before_its_checkpoint_is_repeated(place, tmp_path, monkeypatch, capfd):
    folder, small = place
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "0.tmp").mkdir(parents=True)
    shutil.copytree(folder / "run" / "pretrained", "run/pretrained")
    for name in ("config.json", "experiment.py", "versions.json"):  # tokenizer.json is written next
        shutil.copy(folder / "run" / name, f"run/{name}")
    assert call("--mode=import", FINE, f"--checkpoint={folder / 'llama'}", "--workdir=run", *small) == 0
    out, err = capfd.readouterr()
    assert "imported" in out and err == ""
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode=import"], "--mode=import needs --checkpoint"),
        (["--mode=import", "--checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["--mode=import", "--checkpoint={llama}", "--workdir={run}"], "already holds a run"),
        (["--mode=export", "--workdir={run}"], "--mode=export needs --output_dir"),
        (["--mode=export", "--workdir={run}", "--output_dir={run}"], "is not empty"),
        (["--mode=export", "--output_dir=x"], "--mode=export needs a trained run"),
        (["--mode=train", "--output_dir=x"], "--output_dir does not apply to --mode=train"),
        ([FINE], "set --config.init to a folder"),
        ([FINE, "--config.init={llama}", "--config.model.vocab_size=9"], "model.vocab_size=9 is less than"),
        ([FINE, "--config.init={llama}", "--config.model.width=32"], "wrong shape"),
    ],
)
def test_invalid_import_and_export_are_rejected(place, tmp_path, monkeypatch, capfd, arguments, message):
    folder, small = place
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(llama=folder / "llama", run=folder / "run") for a in arguments]
    capfd.readouterr()
    training = not any(a.startswith("--mode=export") for a in arguments)
    assert call(*arguments, *(small if training else [])) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("checkpoints"))
