"""End-to-end runs of the command line, in a subprocess started from another folder."""

import json
import os
import re
import resource

import numpy as np
import pytest
from PIL import Image

from attnlab.runner.exit_codes import ExitCode
from tests.programs import ROOT, call, metrics, program, write_text, write_tiny

SMALL = [
    *("--config.model.depth=1", "--config.model.width=32", "--config.model.attention.heads=4"),
    *("--config.model.attention.kv_heads=2", "--config.data.tokenizer=Bytes"),
    *("--config.data.sequence_length=32", "--config.data.batch_size=8"),
]  # fmt: skip


def run_ok(*arguments, cwd, **options):
    done = program(*arguments, cwd=cwd, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return done.stdout


def run_until_claim_fails(*arguments, cwd):
    """Return the output of a run that ends with a failed claim, after too few steps."""
    done = program(*arguments, cwd=cwd)
    assert done.returncode == ExitCode.CLAIM_FAILED, done.stderr[-2000:]
    assert done.stderr.startswith("claim failed: ") and done.stderr.count("\n") == 1
    return done.stdout


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Return the folder and output of a `--fast_dev_run` of a small default experiment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    text = write_text(folder / "words.txt", lines=2000)
    config = f"--config={ROOT / 'experiments' / 'lm_docs.py'}"
    out = run_ok(
        config, *SMALL, f"--config.data.name=text:{text}", "--fast_dev_run", "--workdir=run", cwd=folder
    )
    return folder, out


def test_fast_dev_run_writes_every_output(lm):
    folder, out = lm
    files = {p.name for p in (folder / "run").iterdir()}
    assert files == {
        *("config.json", "experiment.py", "versions.json", "tokenizer.json", "metrics.jsonl", "tensorboard"),
        *("checkpoints", "report.json", "figures", "data_fingerprint.json"),
    }
    figures = {p.name for p in (folder / "run" / "figures").iterdir()}
    assert figures == {"attention.png", "attention.svg", "curve.png", "curve.svg"}
    report = json.loads((folder / "run" / "report.json").read_text())
    numbers = {"bits_per_byte_model", "bits_per_byte_bz2", "bits_per_byte_xz"}
    assert set(report) == numbers | {"claims", "fast_dev_run"}
    assert out.startswith(f"new run of lm_docs ({ROOT}/experiments/lm_docs.py) in run\n")
    assert (
        "training in" in out and "done at step 2" in out and "resume, evaluate or sample with: python " in out
    )


def test_progress_is_plain_lines_without_terminal(lm):
    _, out = lm
    assert "\x1b" not in out and "\r" not in out
    assert re.search(r"^step 1/2  train +loss \d\.\d{4} +[\d.]+k? tokens/s", out, re.MULTILINE)
    assert re.search(r"^step 2/2  eval +loss \d\.\d{4}  accuracy", out, re.MULTILINE)


def test_metrics_file_has_one_object_per_line(lm):
    folder, _ = lm
    lines = metrics(folder / "run")
    assert [(line["step"], line["split"]) for line in lines] == [
        (1, "train"),
        (1, "eval"),
        (2, "train"),
        (2, "eval"),
    ]
    common = {"step", "split", "loss", "accuracy", "bits_per_byte"}
    speed = {"grad_norm", "tokens_per_second", "model_flops_utilization", "input_wait"}
    for line in lines:
        assert common | (speed if line["split"] == "train" else set()) <= set(line)
        assert all(isinstance(value, int | float) for name, value in line.items() if name != "split")


def test_workdir_alone_resumes(lm):
    folder, _ = lm
    before = metrics(folder / "run")
    out = run_until_claim_fails("--workdir=run", "--config.train.steps=4", cwd=folder)
    assert "resuming at step 2" in out and "done at step 4" in out
    assert metrics(folder / "run")[: len(before)] == before
    assert metrics(folder / "run")[-1]["step"] == 4


def test_eval_and_describe_print_metrics_and_config(lm):
    folder, _ = lm
    out = run_until_claim_fails("--mode=eval", "--workdir=run", cwd=folder)
    assert re.search(r"^step \d: loss \d\.\d{4}, accuracy [\d.]+, bits_per_byte [\d.]+$", out, re.MULTILINE)
    out = run_ok("--mode=describe", "--workdir=run", cwd=folder)
    assert re.search(r"^params_sha256: [0-9a-f]{64}$", out, re.MULTILINE)
    assert "model.depth" in out and "FLOPs per token" in out


@pytest.mark.long
def test_sample_prints_samples_of_prompt(lm):
    folder, _ = lm
    out = run_ok("--mode=sample", "--workdir=run", "--prompt=the cat", "--max_new_tokens=8", cwd=folder)
    assert out.startswith("the cat") and out.endswith("\n") and "---" not in out
    repeated = run_ok("--mode=sample", "--workdir=run", "--prompt=the cat", "--max_new_tokens=8", cwd=folder)
    assert repeated == out  # the seed is fixed
    two = run_ok(
        "--mode=sample", "--workdir=run", "--prompt=the", "--num_samples=2", "--max_new_tokens=8", cwd=folder
    )
    assert two.count("--- ") == 2 and "--- 1 of 2\nthe" in two
    stopped = run_ok(
        *("--mode=sample", "--workdir=run", "--prompt=the", "--stop= ", "--temperature=0"),
        *("--max_new_tokens=20",), cwd=folder,
    )  # fmt: skip
    assert " " not in stopped.removeprefix("the").removesuffix("\n")


@pytest.mark.long
def test_sample_captions_image_files(tmp_path, capfd):
    run, (cat, dog) = f"--workdir={tmp_path / 'run'}", [tmp_path / f"{name}.png" for name in ("cat", "dog")]
    for seed, file in enumerate((cat, dog)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (50, 70, 3), np.uint8)).save(file)
    small = ["--max_steps=1", "--config.train.eval_batches=1", "--config.data.batch_size=8"]
    small += ["--config.model.encoder.depth=1", "--config.model.decoder.depth=1"]
    assert call(f"--config={ROOT / 'experiments' / 'caption.py'}", run, *small) == 0
    capfd.readouterr()
    sample = ["--mode=sample", run, "--max_new_tokens=4"]
    assert call(*sample, f"--source={cat}", f"--source={dog}", "--temperature=0") == 0
    out = capfd.readouterr().out
    assert out.startswith("--- 1 of 2\n") and "--- 2 of 2\n" in out
    assert call(*sample, f"--source={cat}", "--num_beams=2", "--num_samples=2") == 0
    assert "score" in capfd.readouterr().out
    for invalid, message in (
        ([], "set --source to a file"),
        ([f"--source={tmp_path / 'nowhere.png'}"], "there is no file"),
        ([f"--source={ROOT / 'README.md'}"], "README.md is not an image"),
        (
            [f"--source={cat}", f"--source={dog}", *["--prompt=a"] * 3],
            "--prompt is given 3 times and --source 2",
        ),
    ):
        assert call(*sample, *invalid) == 2
        assert message in capfd.readouterr().err


@pytest.mark.long
def test_pronoun_experiment_writes_report_and_figures(tmp_path):
    config = f"--config={ROOT / 'experiments' / 'pronoun.py'}"
    out = run_ok(config, "--fast_dev_run", "--workdir=run", "--config.model.width=16", cwd=tmp_path)
    assert "resolved: " in out and "claims are not checked in a fast_dev_run" in out
    assert "claim FAILS" not in out and "claim holds" not in out
    assert {p.name for p in (tmp_path / "run" / "figures").iterdir()} == {"it.png", "it.svg"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report) == {"accuracy", "best_head", "claims", "fast_dev_run"}
    assert (report["claims"], report["fast_dev_run"]) == ([], True)
    assert all("bits_per_byte" not in line for line in metrics(tmp_path / "run", "eval"))
    out = run_until_claim_fails("--mode=eval", "--workdir=run", cwd=tmp_path)
    assert "claim FAILS" in out  # eval reports in full
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [claim["held"] for claim in report["claims"]] == [False, False] and "fast_dev_run" not in report


# In this process ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    return "--config=tiny.py"


def test_sweep_prints_table(tiny, tmp_path, capfd):
    assert call(tiny, "--sweep=optimizer.learning_rate=1e-2,1e-4", "--workdir=sweep") == 0
    out, err = capfd.readouterr()
    assert err == ""
    _header, best, other = out[out.index("optimizer.learning_rate  eval_loss") :].splitlines()[:3]
    assert best.split()[0] == "0.01" and other.split()[0] == "0.0001"
    assert float(best.split()[1]) < float(other.split()[1])
    assert {p.name for p in (tmp_path / "sweep").iterdir()} == {
        *("learning_rate=0.01", "learning_rate=0.0001", "sweep.json")
    }


def test_overfit_batches_memorizes_one_batch(tiny):
    assert call(tiny, "--workdir=run", "--overfit_batches=1", "--config.train.steps=40") == 0
    losses = [line["loss"] for line in metrics("run", "train")]
    assert losses[-1] < losses[0] - 2


def test_profile_writes_trace(tiny, tmp_path, capfd):
    assert call(tiny, "--workdir=run", "--profile=2:4") == 0
    assert "wrote a profiler trace of steps 2 to 3 to " in capfd.readouterr().out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_init_from_copies_parameters(tiny, capfd):
    assert call(tiny, "--workdir=one") == 0
    assert call(tiny, "--workdir=two", "--init_from=one", "--seed=3", "--max_steps=1") == 0
    assert "initialized 12 of 12 parameters from the source run" in capfd.readouterr().out
    first, last = metrics("two", "train")[0]["loss"], metrics("one", "eval")[-1]["loss"]
    assert first == pytest.approx(last, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp_tensor", "data:2,fsdp:2,tensor:2"])
def test_training_on_named_and_sized_meshes(tiny, mesh, capfd):
    assert call(tiny, "--workdir=run", f"--mesh={mesh}", "--max_steps=1", "--xla_flags=recommended") == 0
    out, err = capfd.readouterr()
    assert (
        f"on mesh {'data:8' if mesh == 'data' else 'fsdp:4,tensor:2' if mesh == 'fsdp_tensor' else mesh} (8 cpu devices; no recommended XLA flags)"
        in out
    )
    assert err == ""


def test_debug_nans_stops_at_operation(tiny, capfd):
    huge = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=none"]
    assert call(tiny, "--workdir=run", "--debug_nans", *huge, "--config.train.steps=9") == 1
    _, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "nan" in err


@pytest.mark.long
def test_same_seed_repeats_losses(tiny):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(tiny, f"--workdir={name}", f"--seed={seed}", "--max_steps=2") == 0
    a, b, c = ([line["loss"] for line in metrics(name)] for name in "abc")
    assert a == b != c


def test_eval_batches_limits_evaluation(tiny):
    for count in (1, 2):
        assert call(tiny, f"--workdir={count}", f"--config.train.eval_batches={count}", "--max_steps=1") == 0
    assert metrics("1", "eval")[0]["loss"] != metrics("2", "eval")[0]["loss"]


def test_help_takes_under_two_seconds_without_jax(tmp_path):
    """The limit is on CPU time."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("jax", "flax", "orbax"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden')")
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run_ok("--help", cwd=tmp_path, PYTHONPATH=os.fspath(hidden))
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--workdir" in out
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 2


OWN_FILE = '''"""Sentences of a file of its own."""

from dataclasses import dataclass, replace

import tiny
from attnlab.data import Bytes, Data


@dataclass(frozen=True, kw_only=True)
class Lines(Data):
    path_fields = ("file",)
    file: str = "words.txt"

    def records(self, split):
        with open(self.file) as file:
            lines = file.read().splitlines()
        return [{"text": line} for line in (lines[:20] if split == "validation" else lines[20:])]


def get_config():
    experiment = tiny.get_config()
    return replace(experiment, data=Lines(tokenizer=Bytes(), sequence_length=16, batch_size=8))
'''


def test_relative_data_path_is_resolved_at_start(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "own.py").write_text(OWN_FILE)
    (tmp_path / "elsewhere").mkdir()
    assert call("--config=own.py", "--fast_dev_run", "--workdir=run") == 0
    assert (
        call("--config=tiny.py", "--config.data.name=text:./words.txt", "--max_steps=1", "--workdir=text")
        == 0
    )
    monkeypatch.chdir("elsewhere")
    assert call("--mode=eval", "--workdir=../run") == 0
    assert call("--mode=eval", "--workdir=../text") == 0
    (tmp_path / "words.txt").unlink()
    capfd.readouterr()
    assert call("--mode=eval", "--workdir=../run") == 2
    assert capfd.readouterr().err == f"error: {tmp_path}/words.txt: No such file or directory\n"
    assert call("--mode=eval", "--workdir=../text") == 2
    assert capfd.readouterr().err == f"error: text:{tmp_path}/words.txt matches no file\n"
