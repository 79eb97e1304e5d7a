"""The command line: from arguments to the requests passed to the runner."""

import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import pytest
from absl import flags

import attnlab
import run
from attnlab import config as configs
from attnlab.errors import InputError, StorageError
from attnlab.runner import cli
from attnlab.runner.exit_codes import ClaimsFailed, Stopped
from attnlab.runner.lock import exclusive
from attnlab.runner.request import BOUNDS, FLAG_MODES

ROOT = Path(run.__file__).parent
EXPERIMENT = '''"""A toy language model.

Nothing is learnt.
"""
from dataclasses import dataclass

@dataclass(frozen=True)
class AdamW:
    learning_rate: float = 1e-3

@dataclass(frozen=True)
class Lion:
    learning_rate: float = 1e-4

@dataclass(frozen=True)
class Model:
    depth: int = 2

@dataclass(frozen=True)
class Train:
    steps: int = 10

@dataclass(frozen=True)
class Data:
    length: int = 8

@dataclass(frozen=True)
class Experiment:
    model: Model = Model()
    optimizer: AdamW | Lion = AdamW()
    train: Train = Train()
    data: Data = Data()
    seed: int = 0

def get_config(size: str = "small"):
    return Experiment(Model(depth={"small": 2, "large": 20}[size]))
'''


class Runner(types.ModuleType):
    """A fake runner that records the requests and saves their configs as a run does."""

    def __init__(self):
        super().__init__("attnlab.runner.modes")
        self.requests = []
        self.answer = lambda request: {"loss": 1.0}

    def run(self, request):
        self.requests.append(request)
        if request.mode == "train":
            configs.save(request.workdir, request.loaded, request.config, request.sources)
        return self.answer(request)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    runner = Runner()
    monkeypatch.setitem(sys.modules, "attnlab.runner.modes", runner)
    return runner


def call(*arguments):
    return cli.main(["run.py", *arguments])


def train(*arguments):
    return call("--config=toy", *arguments)


def test_flags_match_flag_modes():
    defined = {flag.name for flag in flags.FLAGS.flags_by_module_dict()["attnlab.runner.flags"]}
    assert defined == set(FLAG_MODES)
    assert set(BOUNDS) <= defined


def test_train_creates_dated_workdir_by_default(runner, tmp_path):
    assert train() == 0
    assert train() == 0  # possibly within the same second
    one, two = runner.requests
    assert one.mode == "train"
    assert one.workdir != two.workdir
    assert Path(one.workdir).parent == tmp_path / "runs"
    assert one.workdir.name.startswith("toy-20")
    assert one.config.model.depth == 2
    assert (one.mesh, one.seed, one.max_steps, one.checkpoint) == ("auto", None, None, "latest")


def test_request_contains_opening_line(runner):
    assert train("--workdir=w") == 0
    assert train("--workdir=w") == 0
    assert call("--workdir=w", "--mode=eval") == 0
    assert call("--workdir=w", "--mode=describe") == 0
    assert [request.opening for request in runner.requests] == [
        "new run of toy (experiments/toy.py) in w",
        "starting toy in w again: it has no checkpoint",
        "evaluating toy in w",
        "",
    ]


def test_no_experiment_code_does_not_run_the_file_of_a_workdir(runner, tmp_path, capsys):
    assert train("--workdir=w") == 0
    assert call("--workdir=w", "--mode=eval", "--no_experiment_code") == 2
    assert "experiment:" in (line := capsys.readouterr().err) and line.count("\n") == 1
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    record["config"] = {"$type": "attnlab.data.tokenizer:Bytes"}
    (tmp_path / "w" / "config.json").write_text(json.dumps(record))
    (tmp_path / "w" / "experiment.py").write_text("raise SystemExit('this code ran')")
    for mode in ("eval", "sample", "describe", "export"):
        more = ["--output_dir=out"] if mode == "export" else []
        assert call("--workdir=w", f"--mode={mode}", "--no_experiment_code", *more) == 0
        assert (runner.requests[-1].loaded.module, runner.requests[-1].no_experiment_code) == (None, True)
    assert call("--workdir=w", "--mode=eval") == 2
    assert "this code ran" in capsys.readouterr().err


def test_overrides_apply_in_order_and_in_both_spellings(runner):
    arguments = ["--config.model.depth=3", "--config.model.depth", "-4", "-config.optimizer=Lion"]
    assert train(*arguments, "--config.train.steps=7") == 0
    (request,) = runner.requests
    assert request.config.model.depth == -4
    assert type(request.config.optimizer).__name__ == "Lion"
    assert request.sources["model.depth"] == request.sources["train.steps"] == "flag"
    assert request.sources["data.length"] == "default"


def test_request_contains_flag_values(runner, tmp_path):
    code = train(
        *("--workdir=w", "--mesh=fsdp=4", "--max_steps=5", "--max_time=1.5m", "--seed=3", "--fast_dev_run"),
        *("--overfit_batches=2", "--profile=10:13", "--debug_nans", "--init_from=~/old", "--checkpoint=12"),
        *("--init_rules=^a/(.*)->b/\\1", "--init_rules=x->", "--tracker=wandb", "--tracker=mlflow"),
        "--dump_hlo=hlo",
    )
    assert code == 0
    (request,) = runner.requests
    assert (request.mesh, request.max_steps, request.max_time, request.seed) == ("fsdp=4", 5, 90.0, 3)
    assert (request.fast_dev_run, request.overfit_batches, request.debug_nans) == (True, 2, True)
    assert (request.profile, request.checkpoint) == ((10, 13), 12)
    assert str(request.init_from) == os.path.expanduser("~/old")
    assert request.init_rules == (("^a/(.*)", "b/\\1"), ("x", ""))
    assert request.trackers == ("wandb", "mlflow")
    assert str(request.workdir) == str(tmp_path / "w")
    assert str(request.dump_hlo) == str(tmp_path / "hlo")


def test_request_contains_sampling_flags(runner):
    assert train("--workdir=w") == 0
    code = call(
        *("--mode=sample", "--workdir=w", "--prompt=a,b", "--prompt=c", "--num_samples=3", "--temperature=0"),
        *("--top_k=5", "--top_p=0.9", "--min_p=0.1", "--stop=\n", "--max_new_tokens=7", "--checkpoint=best"),
    )
    assert code == 0
    sampling = runner.requests[-1].sampling
    assert (sampling.prompts, sampling.stop) == (("a,b", "c"), ("\n",))
    assert (sampling.num_samples, sampling.max_new_tokens, sampling.temperature) == (3, 7, 0.0)
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (5, 0.9, 0.1)
    assert runner.requests[-1].checkpoint == "best"


def test_flagfile_may_contain_overrides(runner, tmp_path):
    (tmp_path / "flags").write_text("--config=toy\n# a comment\n--config.model.depth=5\n")
    assert call("--flagfile=flags") == 0
    assert runner.requests[0].config.model.depth == 5


def test_describe_creates_no_workdir(runner, tmp_path):
    assert call("--mode=describe", "--config=toy:large") == 0
    assert runner.requests[0].workdir is None
    assert runner.requests[0].config.model.depth == 20
    assert not (tmp_path / "runs").exists()


# Resuming the run of a workdir --------------------------------------------------------------------


def test_workdir_alone_resumes_its_run(runner, tmp_path):
    assert train("--workdir=w", "--config.model.depth=7") == 0
    (tmp_path / "experiments" / "toy.py").unlink()
    assert call("--workdir=w") == 0
    assert call("--workdir=w", "--config.train.steps=99") == 0
    first, second, third = runner.requests
    assert configs.differences(first.config, second.config) == []
    assert second.sources == first.sources
    assert configs.differences(first.config, third.config) == ["train.steps: 10 -> 99"]
    assert third.sources == first.sources | {"train.steps": "flag"}
    assert third.loaded.name == "toy"


def test_workdir_with_different_config_is_rejected(runner, capsys):
    assert train("--workdir=w", "--config.model.depth=7") == 0
    assert train("--workdir=w", "--config.model.depth=7") == 0
    capsys.readouterr()
    assert train("--workdir=w") == 2
    assert "w holds a run with a different config: model.depth: 7 -> 2" in capsys.readouterr().err
    assert call("--workdir=w", "--config.optimizer=Lion", "--config.train.steps=5") == 2
    message = capsys.readouterr().err
    assert "optimizer: AdamW -> Lion" in message
    assert "train.steps" not in message
    assert len(runner.requests) == 2


def test_eval_may_override_data(runner, capsys):
    assert train("--workdir=w") == 0
    assert call("--mode=eval", "--workdir=w", "--config.data.length=64") == 0
    assert call("--mode=eval", "--workdir=w", "--config.model.depth=64") == 2
    assert call("--mode=describe", "--workdir=w", "--config.model.depth=64") == 0


# Invalid input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confg=toy"], "error: unknown flag --confg; did you mean 'config'?"),
        (["--frobnicate"], "error: unknown flag --frobnicate"),
        (["--mode=trian"], "--mode=trian: value should be one of <train|eval|sample|describe|import|export>"),
        (["--max_steps=ten"], "--max_steps=ten: expected an integer"),
        (["--mode=sample", "--temperature=hot"], "--temperature=hot: expected a number"),
        (["--max_steps"], "--max_steps"),
        (["--max_steps=0"], "--max_steps=0 is out of bounds; it must be 1 or more"),
        (["--mode=sample", "--temperature=-1"], "--temperature=-1.0 is out of bounds"),
        (["--mode=sample", "--temperature=nan"], "--temperature=nan is out of bounds"),
        (["--mode=sample", "--top_p=0"], "--top_p=0.0 is out of bounds; it must be above 0, and at most 1"),
        (["--mode=sample", "--min_p=1.5"], "--min_p=1.5 is out of bounds"),
        (["--seed=-1"], "--seed=-1 is out of bounds"),
        (["--max_time=soon"], "--max_time=soon: expected a duration"),
        (["--max_time=0s"], "--max_time=0s: expected a duration above 0"),
        (["--profile=13:10"], "--profile=13:10: expected start:stop"),
        (["--dump_hlo=a b"], "a b: expected a local folder without spaces in its path"),
        (["--mode=eval", "--checkpoint=newest"], "--checkpoint=newest: expected latest, best or a step"),
        (["--checkpoint=best"], "--checkpoint with --mode=train requires --init_from"),
        (["--init_rules=a->b"], "--init_rules requires --init_from"),
        (["--init_from=x", "--init_rules=ab"], "--init_rules=ab: expected regex->replacement"),
        (["--init_from=x", "--init_rules=(->b"], "--init_rules=(->b: "),
        (["--init_from=x", "--init_rules=a->\\1"], "--init_rules=a->\\1: invalid group reference"),
        (["--tracker=sacred"], "--tracker=sacred: value should be one of <wandb|mlflow>"),
        (["--prompt=hi"], "--prompt does not apply to --mode=train, only to --mode=sample"),
        (
            ["--mode=eval", "--sweep=model.depth=1"],
            "--sweep does not apply to --mode=eval, only to --mode=train",
        ),
        (["--mode=describe", "--seed=1"], "--seed does not apply to --mode=describe"),
        (["--mode=eval"], "--mode=eval needs a trained run; set --workdir"),
        (["--mode=sample", "--workdir=none"], "holds no run (it has no config.json)"),
        (["train"], "unexpected argument 'train'"),
        (["--fast_dev_run", "true"], "unexpected argument 'true'"),
        (["--workdir="], "--workdir is empty"),
        (["--workdir=experiments/toy.py"], "cannot create the folder"),
        (["--workdir=experiments/toy.py/x"], "cannot create the folder"),
        (["--workdir=nostorage://x"], "nostorage://x"),
        (["--config="], "no experiment file ''"),
        (["--config=tpy"], "no experiment file 'tpy'; did you mean 'toy'? Experiments: toy"),
        (["--config=toy:huge"], "error: experiments/toy.py:36: KeyError: 'huge'"),
        (["--config.model.dpth=3"], "config.model has no field 'dpth'; did you mean 'depth'? Fields: depth"),
        (["--config.model.depth=x"], "config.model.depth=x: expected int"),
        (["--config.model.depth"], "--config.model.depth needs a value"),
        (["--config.model.depth", "--fast_dev_run"], "--config.model.depth needs a value"),
        (["--sweep=model.depth"], "--sweep=model.depth: expected a field and its values"),
        (["--sweep=model.depth=1,x"], "config.model.depth=x: expected int"),
        ([f"--sweep=model.depth={'1' * 99},2"], "config.model.depth=11111"),
        (
            [f"--sweep=optimizer=Lion(learning_rate=0.{'1' * 210})"],
            "too long for a folder name; define it in an experiment file",
        ),
        (["--sweep=model.depth=1,1"], "--sweep lists depth=1 twice"),
        (["--sweep=model.depth=1", "--sweep=config.model.depth=2"], "--sweep names model.depth twice"),
        (
            ["--sweep=model.depth=1", "--config.model.depth=2"],
            "config.model.depth is both set by a flag and swept",
        ),
        (["--flagfile=gone"], "error: the --flagfile cannot be read: [Errno 2] No such file"),
        (["--mode=sample", "--num_beams=0"], "--num_beams=0 is out of bounds; it must be 1 or more"),
        (["--mode=sample", "--num_beams=2", "--top_k=3"], "--top_k cannot be combined with --num_beams"),
        (["--mode=sample", "--num_beams=2", "--num_samples=3"], "--num_samples=3 exceeds --num_beams=2"),
        (
            ["--mode=sample", "--num_beams=2", "--kv_cache=paged"],
            "--kv_cache=paged cannot be combined with --num_beams",
        ),
        (["--mode=sample", "--kv_cache=huge"], "should be one of <contiguous|rolling|paged|int8|fp8>"),
        (
            ["--mode=sample", "--num_beams=2", "--prompt_lookup_ngram=3"],
            "--prompt_lookup_ngram cannot be combined with --num_beams",
        ),
        (["--mode=sample", "--prompt_lookup_ngram=0"], "--prompt_lookup_ngram=0 is out of bounds"),
        (["--mode=sample", "--prompt_lookup_ngram=2", "--draft_model=x"], "both propose draft tokens"),
        (
            ["--mode=sample", "--num_speculative_tokens=2"],
            "--num_speculative_tokens requires --draft_model or --prompt_lookup_ngram",
        ),
        (["--mode=sample", "--length_penalty=1"], "--length_penalty requires --num_beams"),
        (["--max_steps=" + "9" * 5000], "expected an integer"),
        (["--max_time=" + "9" * 5000], "--max_time=999"),
        (["--max_time=\u0669"], "--max_time=\u0669: expected a duration"),
        (["--profile=" + "9" * 5000 + ":" + "9" * 5001], "expected start:stop"),
        (["--profile=\u0661:\u0662"], "expected start:stop"),
        (["--mode=eval", "--checkpoint=" + "9" * 5000], "expected latest, best or a step"),
        (["--mode=eval", "--checkpoint=\u0663"], "--checkpoint=\u0663: expected latest, best or a step"),
        (["--mesh=data:" + "9" * 5000], "--mesh=data:999"),
        (["--mesh="], "--mesh=: expected a preset or sizes"),
        (["--mesh=data:\u0662"], "expected a preset or sizes"),
        (["--overfit_batches=1000000000000"], "it must be from 1 to 10,000"),
        (["--config.model.depth=" + "9" * 5000], "expected int"),
        (["--config.model.depth=1e100"], "config.model.depth=1e100: expected int"),
        (["--workdir=" + "x/" * 3000], "cannot be used as a path"),
        (["--workdir=" + "x" * 300], "cannot be used as a path: File name too long"),
        (["--workdir=" + "x/" * 1500], "too many nested folders"),
        (["--mode=export", "--output_dir=" + "x" * 300], "cannot be used as a path"),
        (["--config=" + "x" * 300], "no experiment file 'xxx"),
        (["--config=" + "x" * 300 + ".json"], "holds no run"),
    ],
    ids=lambda x: x[:60] if isinstance(x, str) else None,
)
def test_bad_input_prints_one_line_and_exits_2(runner, capsys, tmp_path, arguments, message):
    arguments = arguments if any(a.startswith("--conf") for a in arguments) else ["--config=toy", *arguments]
    assert cli.main(["run.py", "--config=toy", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert runner.requests == []
    assert not (tmp_path / "runs").exists()


def test_binary_flagfile_prints_one_line_and_exits_2(runner, capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"--mode\xff\x80")
    assert cli.main(["run.py", "--flagfile=binary"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the --flagfile cannot be read") and err.count("\n") == 1


def test_flagfile_that_includes_itself_prints_one_line_and_exits_2(runner, capsys, tmp_path):
    (tmp_path / "first").write_text("--flagfile=second")
    (tmp_path / "second").write_text("--mode=describe\n--flagfile=first\n")
    assert cli.main(["run.py", "--config=toy", "--flagfile=first"]) == 2
    assert capsys.readouterr() == ("", "error: the --flagfile includes itself: first\n")


OLD_CONFIG = {
    "attnlab": "0.1.0",
    "experiment": {"name": "lm_docs", "argument": None},
    "mesh": "single",
    "sources": {"train.steps": "file"},
    "config": {
        "$type": "attnlab.train.experiment:Experiment",
        "model": {
            "$type": "attnlab.models.decoder:DecoderConfig",
            "depth": 2,
            "skip_first_attention_norm": True,
        },
        "train": {"$type": "attnlab.train.experiment:Train", "steps": 20},
    },
}


@pytest.mark.parametrize("mode", ["train", "eval", "sample", "describe", "export"])
def test_workdir_of_older_version_prints_one_line_and_exits_2(runner, capsys, tmp_path, mode):
    file = tmp_path / "old" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(OLD_CONFIG))
    extra = ["--output_dir=out"] if mode == "export" else []
    assert call(f"--mode={mode}", "--workdir=old", *extra) == 2
    versions = f"was written by attnlab 0.1.0 and cannot be read by attnlab {attnlab.__version__}"
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), runner.requests) == ("", 1, [])
    assert err.startswith(f"error: {file} {versions}: config")
    assert err.endswith("; start a new run\n")


def test_input_error_of_runner_prints_one_line(runner, capsys):
    def refuse(request):
        raise InputError("no such\nmesh")

    runner.answer = refuse
    assert train() == 2
    assert capsys.readouterr().err == "error: no such mesh\n"


def test_experiment_file_may_remove_the_standard_output_but_not_close_it(runner, capsys, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr("sys.stdout", output)
    runner.answer = lambda request: setattr(sys, "stdout", None)
    assert train() == 0
    sys.stdout = output
    runner.answer = lambda request: (sys.stdout.close(), print("x"))
    assert train() == 2
    assert capsys.readouterr().err == "error: the experiment file closed the standard output\n"


class Unprintable(BaseException):
    def __str__(self):
        raise self


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a\nb"), GeneratorExit(), Unprintable(), ValueError("\ud800")]
)
def test_unexpected_exceptions_leave_one_line_and_a_file(runner, capsys, tmp_path, monkeypatch, error):
    def bug(request):
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("ATTNLAB_DEBUG", raising=False)
    runner.answer = bug
    assert train() == 1
    (report,) = tmp_path.glob("attnlab-*.txt")
    line = capsys.readouterr().err
    assert line.startswith(f"error: unexpected {type(error).__name__}") and line.endswith(f" {report}\n")
    assert line.count("\n") == 1
    text = report.read_text()
    assert "in bug\n    raise error" in text and "jax" in text and ascii(sys.argv[0]) in text
    monkeypatch.setenv("ATTNLAB_DEBUG", "1")
    with pytest.raises(type(error)):
        train()


def test_failing_storage_prints_one_line(runner, capsys):
    def fail(request):
        raise StorageError("/runs/a/metrics.jsonl could not be written 4 times: Input/output error")

    runner.answer = fail
    assert train() == 1
    message = "/runs/a/metrics.jsonl could not be written 4 times: Input/output error"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_interrupt_prints_one_line(runner, capsys):
    def interrupt(request):
        raise KeyboardInterrupt

    runner.answer = interrupt
    assert train() == 130
    assert capsys.readouterr().err == "interrupted\n"


# Sweeps ------------------------------------------------------------------------------------------


def test_sweep_runs_every_combination_and_prints_table(runner, capsys, tmp_path):
    def answer(request):
        depth = request.config.model.depth
        if depth == 3:
            raise FloatingPointError("loss is NaN\nat step 4")
        return {"train/loss": 0.5, "validation/loss": 1 / depth * request.config.optimizer.learning_rate}

    runner.answer = answer
    sweeps = ["--sweep=config.optimizer.learning_rate=1e-3,3e-4", "--sweep=model.depth=2,3"]
    assert train("--workdir=w", *sweeps) == 1  # one run failed
    folders = [request.workdir.name for request in runner.requests]
    assert folders == [
        f"learning_rate={rate},depth={depth}" for rate in ("0.001", "0.0003") for depth in (2, 3)
    ]
    assert all(request.sources["model.depth"] == "flag" for request in runner.requests)
    assert Path(runner.requests[0].workdir).parent == tmp_path / "w"
    rows = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert rows[0]["values"] == {"optimizer.learning_rate": "0.001", "model.depth": "2"}
    assert rows[0]["metrics"] == {"train/loss": 0.5, "validation/loss": 0.0005}
    assert rows[1]["error"] == "FloatingPointError: loss is NaN at step 4"
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("optimizer.learning_rate "))
    assert lines[head].split() == ["optimizer.learning_rate", "model.depth", "validation/loss", "train/loss"]
    assert lines[head + 1].split() == ["0.0003", "2", "0.00015", "0.5"]
    assert lines[head + 2].split() == ["0.001", "2", "0.0005", "0.5"]
    assert lines[head + 3].split(maxsplit=5)[:4] == ["0.001", "3", "-", "-"]
    assert lines[head + 3].endswith("failed: FloatingPointError: loss is NaN at step 4")


@pytest.mark.parametrize("index", [0, 1])
def test_sweep_of_a_job_is_announced_by_process_0(runner, capsys, index):
    job = ("--coordinator=node1:8476", "--num_processes=2", f"--process_id={index}")
    assert train("--workdir=w", "--sweep=model.depth=1,2", *job) == 0
    assert ("run 1 of 2: config.model.depth=1\n" in capsys.readouterr().out) == (index == 0)


def test_sweep_over_components_with_infinite_losses(runner, tmp_path):
    runner.answer = lambda request: {"loss": float("inf")}
    assert train("--sweep=optimizer=AdamW(learning_rate=0.5),Lion") == 0
    assert [r.workdir.name for r in runner.requests] == [
        "optimizer=AdamW(learning_rate=0.5)",
        "optimizer=Lion",
    ]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("toy-")
    assert json.loads((folder / "sweep.json").read_text())[0]["metrics"] == {"loss": "Infinity"}


def test_interrupted_sweep_prints_completed_runs(runner, capsys):
    def answer(request):
        if request.config.model.depth == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    runner.answer = answer
    assert train("--sweep=model.depth=1,2,3") == 130
    out, err = capsys.readouterr()
    assert "model.depth" in out
    assert err == "interrupted\n"
    assert len(runner.requests) == 2


@pytest.mark.parametrize(("signal_name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_signal_stops_sweep(runner, capsys, signal_name, code):
    def answer(request):
        if request.config.model.depth == 2:
            raise Stopped(signal_name)
        return {"loss": 1.0}

    runner.answer = answer
    assert train("--sweep=model.depth=1,2,3") == code
    assert len(runner.requests) == 2
    assert "sweep.json" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_process_stopped_alone_fails_its_job(runner, monkeypatch, number, code):
    """Otherwise the others would wait for it in a collective, and it for their end."""
    reasons, exits = [], []
    job = types.SimpleNamespace(in_job=lambda: True, finish=lambda reason="": reasons.append(reason))
    monkeypatch.setitem(sys.modules, "attnlab.distributed.start", job)
    monkeypatch.setattr(os, "_exit", exits.append)
    runner.answer = lambda request: signal.raise_signal(number)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    assert train("--sweep=model.depth=1,2") == code
    signal.signal(signal.SIGINT, earlier)
    assert (reasons[0], exits) == (f"it ended with exit code {code}", [code])


@pytest.mark.parametrize("arguments", [[], ["--sweep=model.depth=1,2"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_outside_of_training_stops_command(runner, capsys, number, arguments):
    runner.answer = lambda request: signal.raise_signal(number)
    assert train(*arguments) == 75
    assert len(runner.requests) == 1
    out, err = capsys.readouterr()
    assert out.endswith(f"stopped by {number.name}; start again with the same command\n") and not err
    assert signal.getsignal(number) is signal.SIG_DFL


def test_failed_claim_has_its_own_exit_code(runner, capsys, tmp_path):
    def answer(request):
        raise ClaimsFailed(["accuracy"], {"loss": 1.0})

    runner.answer = answer
    assert train() == 3
    assert capsys.readouterr().err == "claim failed: accuracy\n"
    assert train("--workdir=s", "--sweep=model.depth=1,2") == 3
    row = json.loads((tmp_path / "s" / "sweep.json").read_text())[1]
    assert (row["metrics"], row["failed_claims"], row["error"]) == ({"loss": 1.0}, ["accuracy"], None)


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 7 TiB\nfor an array"), RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")],
)
def test_exhausted_memory_has_its_own_exit_code(runner, capsys, error):
    def answer(request):
        raise error

    runner.answer = answer
    assert train() == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: does not fit into memory: {' '.join(str(error).split())}"


def test_sweep_stops_at_a_workdir_in_use(runner, capsys, tmp_path):
    def answer(request):
        with exclusive(request.workdir):
            return {"loss": 1.0}

    runner.answer = answer
    with exclusive(tmp_path / "s" / "depth=2"):
        assert train("--workdir=s", "--sweep=model.depth=1,2,3") == 2
    assert len(runner.requests) == 2
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err


def test_sweep_resumes_but_not_in_workdir_of_single_run(runner, capsys):
    assert train("--workdir=s", "--sweep=model.depth=1,2") == 0
    assert train("--workdir=s", "--sweep=model.depth=1,2,3") == 0
    assert train("--workdir=w") == 0
    assert train("--workdir=w", "--sweep=model.depth=1,2") == 2
    assert "holds a single run" in capsys.readouterr().err


# In a subprocess ---------------------------------------------------------------------------------


def program(*arguments, cwd=None, **options):
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, **options)


def test_help_lists_modes_flags_experiments_and_examples(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.py").write_text('"""A toy.\n\nMore."""\nraise SystemExit("was run")')
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; from attnlab.runner import cli; "
    code += "c = cli.main(['run.py', '--help']); assert not {'jax', 'flax'} & set(sys.modules); sys.exit(c)"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 10  # under 2 s on an idle machine
    text = done.stdout
    assert done.stderr == ""
    assert all(f"--{name} " in text for name in FLAG_MODES)
    assert "describe  " in text
    assert "A toy." in text
    assert "python run.py --config=experiments/lm_docs.py" in text
    assert "verbosity" not in text
    assert "test_" not in text


def test_version_lists_libraries_without_importing_them():
    code = "import sys; from attnlab.runner import cli; c = cli.main(['attnlab', '--version']); "
    code += "assert not {'jax', 'flax'} & set(sys.modules); sys.exit(c)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    installed = [metadata.version(name) for name in ("jax", "flax")] + [platform.python_version()]
    expected = "attnlab {} (jax {}, flax {}, Python {})\n".format(attnlab.__version__, *installed)
    assert done.stdout == expected


def test_program_exits_2_with_one_line():
    done = program("--mode=trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} {ROOT / 'run.py'} --help | true"
    for _ in range(3):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert done.stderr == ""


def test_interrupted_program_exits_130(tmp_path):
    fake = "import time\ndef run(request):\n  print('ready', flush=True)\n  time.sleep(60)\n"
    (tmp_path / "toy.py").write_text(EXPERIMENT)
    # A shell that starts the tests in the background makes them ignore SIGINT.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"import sys, types; sys.path.insert(0, {str(ROOT)!r}); m = types.ModuleType('attnlab.runner.modes'); "
    code += f"exec({fake!r}, m.__dict__); sys.modules['attnlab.runner.modes'] = m; import run; "
    code += (
        "from attnlab.runner import cli; sys.exit(cli.main(['run.py', '--config=toy', '--mode=describe']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "interrupted\n")
