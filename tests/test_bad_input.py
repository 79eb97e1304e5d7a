"""Invalid input exits with code 2 and one line on stderr, and changes no existing file."""

import itertools
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import jax
import pytest

from attnlab.train import loop, storage
from tests.programs import call, metrics, program, write_tiny

TEXT = "config.data.name=text:"


@pytest.fixture(scope="module", autouse=True)
def devices():
    """Initialize all eight devices before a run can request fewer."""
    assert len(jax.devices()) == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with an experiment file and its run, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    experiment = write_tiny(folder)
    assert call(f"--config={experiment}", f"--workdir={folder / 'run'}") == 0
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """Copy the run and the experiment into a folder of this test, and change into it."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def file_contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def assert_rejected(capfd):
    """Return a check that the program rejects some arguments with a given message."""

    def check(*arguments, message, keeps=None, expected=2):
        before = file_contents(keeps) if keeps else {}
        capfd.readouterr()
        code = call(*arguments)
        out, err = capfd.readouterr()
        assert code == expected, (code, out, err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        for words in [message] if isinstance(message, str) else message:
            assert words in err, err
        after = file_contents(keeps) if keeps else {}
        assert {path: after.get(path) for path in before} == before
        return out

    return check


INVALID_ARGUMENTS = [
    # flags
    (["--wrokdir=x"], "unknown flag --wrokdir; did you mean 'workdir'?"),
    (["--mode=trian"], "trian"),
    (["--config=experiments/lm_dosc.py"], "lm_dosc"),
    (["--max_steps=many"], "max_steps"),
    (["--max_steps=0"], "--max_steps=0 is out of bounds"),
    (["--max_time=soon"], "--max_time=soon: expected a duration"),
    (["--seed=-1"], "--seed=-1 is out of bounds"),
    (["--overfit_batches=0"], "--overfit_batches=0 is out of bounds"),
    (["--profile=5:3"], "--profile=5:3: expected start:stop"),
    (["--profile=0:3"], "--profile=0:3: expected start:stop"),
    (["--profile=10:13"], "--profile=10:13: the last step is 4"),
    (["--temperature=0.5"], "--temperature does not apply to --mode=train"),
    (["--init_rules=a->b"], "--init_rules requires --init_from"),
    (["--init_from=run", "--init_rules=(->b"], "--init_rules=(->b"),
    (["--tracker=tensorbored"], "tensorbored"),
    # the config
    (["--config.model.dpeth=2"], "no field 'dpeth'; did you mean 'depth'?"),
    (["--config.model.depth=two"], "config.model.depth=two: expected int"),
    (["--config.model.depth=0"], "depth=0 and width=16 must be at least 1"),
    (["--config.model.width=1e15"], "model.width must be at most 2147483647, not 1000000000000000"),
    (["--config.model.depth=1e100"], "config.model.depth=1e100: expected int"),
    (["--config.data.batch_size=1e12"], "data.batch_size must be at most"),
    (["--config.model.width=18"], "width=18 is not a multiple of attention.heads=4"),
    (["--config.model.attention.kv_heads=3"], "kv_heads must divide heads=4: one of 1, 2, 4"),
    (["--config.model.attention.head_dim=0"], "head_dim=0 must be at least 1, or none"),
    (["--config.model.attention.head_dim=1"], "Rotary must rotate at least 2 components of a head"),
    (["--config.model.pattern=Causal(positions=Rotary(fraction=0.1))"], "pattern.0.positions=Rotary must"),
    (["--config.model.pattern=Causal(scale=0)"], "scale=0.0 must be over 0, or none"),
    (["--config.model.positions=Rotary(theta=1)"], "theta=1.0 must be over 1"),
    (["--config.model.feed_forward.width=0"], "width=0 must be at least 1, or none"),
    (["--config.model.feed_forward=GatedMLP(width=-1)"], "width=-1 must be at least 1, or none"),
    (["--config.model.feed_forward=Experts(width=0)"], "width=0 must be at least 1, or none"),
    (["--config.model.dropout=1.5"], "dropout must be"),
    (["--config.model.dtypes.compute=float8"], "compute dtype must be"),
    (["--config.model.feed_forward=MPL"], "MPL"),
    (["--config.model.positions=Learned(length=8)"], "length 16 exceeds positions.length=8"),
    (["--config.optimizer=Adam"], "Adam"),
    (["--config.optimizer.clip_norm=0"], "clip_norm=0.0 must be over 0, or none"),
    (["--config.optimizer.rules=(Rule('nothing_like_it'),)"], "'nothing_like_it' matches no parameter"),
    (["--config.optimizer.rules=(Rule('(bad'),)"], "'(bad' is not a regular expression"),
    (["--config.train.microbatches=3"], "data.batch_size=8 is not a multiple of train.microbatches=3"),
    (["--config.train.ema=1"], "ema must be between 0 and 1"),
    (["--config.train.steps=0"], "steps must be at least 1"),
    (["--config.loss.label_smoothing=1"], "label_smoothing"),
    # the mesh
    (["--mesh=daat"], "--mesh=daat: expected one of auto, single, data, fsdp"),
    (["--mesh=model:2"], "sizes of the axes data, fsdp, expert, sequence, tensor"),
    (["--mesh=data:none"], "the size of data must be a whole number"),
    (["--mesh=data:16"], "needs 16 devices and there are 8; these fit: single, data:8, fsdp:8"),
    (["--mesh=data:4", "--config.data.batch_size=6"], "data.batch_size=6 cannot be sharded 4 ways"),
    (["--mesh=tensor:4"], "model.attention.kv_heads=2 cannot be sharded 4 ways over mesh axes tensor: "
                          "use a multiple of 4, or tensor of 1 or 2"),
    (["--mesh=tensor:8"], "model.attention.heads=4 cannot be sharded 8 ways"),
    (["--mesh=expert:4", "--config.model.feed_forward=Experts(experts=6,width=16)"],
     "model.feed_forward.experts=6 cannot be sharded 4 ways over mesh axes expert: use a multiple of 4, or expert of "
     "1 or 2 or 3"),
    (["--mesh=fsdp:3"], "model.width=16 cannot be sharded 3 ways"),
    # the data
    ([f"--{TEXT}none/*.txt"], "/none/*.txt matches no file"),
    ([f"--{TEXT}empty.txt"], "empty.txt is empty"),
    ([f"--{TEXT}."], "is a directory; name its files, as in text:/"),
    ([f"--{TEXT}latin.txt"], "latin.txt is not UTF-8 text, see byte 3"),
    ([f"--{TEXT}short.txt"], "too little text to leave any for validation"),
    ([f"--{TEXT}/proc/self/mem"], "/proc/self/mem is empty"),
    ([f"--{TEXT}words.txt/deeper"], "matches no file"),
    (["--config.data.name=tfds:nope"], "tfds:nope is neither registered with TFDS"),
    (["--config.data.name=stdlib"], "data.name 'stdlib' is unknown"),
    (["--config.data.tokenizer=BPE(vocab_size=100)"], "BPE vocab_size must be 257"),
    (["--config.data.sequence_length=1"], "data.sequence_length must be 2 or more"),
    # sweeps
    (["--sweep=config.model.dpeth=1,2"], "no field 'dpeth'"),
    (["--sweep=config.model.depth=1,x"], "config.model.depth=x: expected int"),
    (["--sweep=config.model.depth"], "expected a field and its values"),
    # other runs
    (["--init_from=nowhere"], "nowhere holds no run"),
    (["--init_from=run", "--init_rules=nothing_like_it->x"], "'nothing_like_it' matches no parameter"),
    (["--init_from=run", "--init_rules=^->x/"], "no parameter with a name of the source run, such as x/"),
    (["--init_from=run", "--init_rules=(up|down)->up"], "two parameters are renamed to"),
    (["--init_from=run", "--config.model.width=32"], "has shape (257, 16) in the source run and (257, 32) in this run"),
    (["--init_from=run", "--checkpoint=3"], "--checkpoint=3: expected one of latest, best, 2, 4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), INVALID_ARGUMENTS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_invalid_training_arguments_are_rejected(workspace, assert_rejected, arguments, message):
    (workspace / "empty.txt").write_text("\n\n")
    (workspace / "latin.txt").write_bytes(b"nai\xefve " * 100)
    (workspace / "short.txt").write_text("word")
    out = assert_rejected("--config=tiny.py", "--workdir=new", *arguments, message=message, keeps=workspace)
    assert out == ""
    assert not (workspace / "new" / "config.json").exists()


def test_rejected_run_leaves_no_folder(workspace, assert_rejected):
    assert_rejected(
        "--config=tiny.py", "--mesh=tensor:8", message="model.attention.heads=4 cannot be sharded"
    )
    assert not list((workspace / "runs").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "--temperature=-1.0 is out of bounds"),
        (["--temperature=nan"], "--temperature=nan is out of bounds"),
        (["--temperature=warm"], "temperature"),
        (["--top_p=0"], "--top_p=0.0 is out of bounds"),
        (["--top_p=1.1"], "--top_p=1.1 is out of bounds"),
        (["--top_k=0"], "--top_k=0 is out of bounds"),
        (["--min_p=2"], "--min_p=2.0 is out of bounds"),
        (["--num_samples=0"], "--num_samples=0 is out of bounds"),
        (["--max_new_tokens=0"], "--max_new_tokens=0 is out of bounds"),
        (["--stop="], "--stop is empty"),
        (["--prompt=longer than the context of sixteen"], "the prompt has 35 tokens, but the context of the model has 16"),
        (["--checkpoint=3"], "--checkpoint=3: expected one of latest, best, 2, 4"),
        (["--checkpoint=newest"], "expected latest, best or a step"),
        (["--config.model.depth=3"], "holds a run with a different config: model.depth: 2 -> 3"),
        (["--fast_dev_run"], "--fast_dev_run does not apply to --mode=sample"),
    ],
)  # fmt: skip
def test_invalid_sampling_arguments_are_rejected(workspace, assert_rejected, arguments, message):
    assert (
        assert_rejected(
            "--mode=sample", "--workdir=run", *arguments, message=message, keeps=workspace / "run"
        )
        == ""
    )


def test_sampling_from_bidirectional_model_is_rejected(workspace, assert_rejected):
    whole = "--config.model.pattern=(Bidirectional(),)"
    assert call("--config=tiny.py", "--workdir=whole", whole, "--max_steps=1") == 0
    message = "is not causal: it cannot generate"
    assert (
        assert_rejected(
            "--mode=sample", "--workdir=whole", "--prompt=a", message=message, keeps=workspace / "whole"
        )
        == ""
    )


@pytest.mark.parametrize("mode", ["eval", "sample", "train", "describe"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").write_text(""), "it is not JSON"),
        (lambda run: (run / "config.json").write_text('{"a": 1'), "it is not JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is not a config that attnlab saved"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read as a tokenizer"),
        (lambda run: (run / "experiment.py").write_text("def ("), "experiment.py"),
    ],
    ids=["empty config", "broken config", "other config", "no tokenizer", "broken tokenizer", "broken source"],
)  # fmt: skip
def test_damaged_workdir_is_rejected(workspace, assert_rejected, damage, message, mode):
    damage(workspace / "run")
    assert_rejected(f"--mode={mode}", "--workdir=run", message=message, keeps=workspace / "run")


def test_workdir_with_different_config_is_rejected(workspace, assert_rejected):
    message = "run holds a run with a different config: model.width: 16 -> 32"
    assert_rejected(
        "--config=tiny.py",
        "--workdir=run",
        "--config.model.width=32",
        message=message,
        keeps=workspace / "run",
    )
    assert_rejected(
        "--workdir=run", "--seed=7", message="a different config: seed: 0 -> 7", keeps=workspace / "run"
    )


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_workdir_without_run_is_rejected(workspace, assert_rejected, mode):
    (workspace / "hollow").mkdir()
    assert_rejected(
        f"--mode={mode}", "--workdir=hollow", message="hollow holds no run (it has no config.json)"
    )
    assert_rejected(f"--mode={mode}", message="set --workdir")
    shutil.rmtree(workspace / "run" / "checkpoints")
    assert_rejected(f"--mode={mode}", "--workdir=run", message="no checkpoint under", keeps=workspace / "run")


def test_workdir_that_cannot_be_created_is_rejected(workspace, assert_rejected):
    assert_rejected(
        "--config=tiny.py", "--workdir=words.txt", message="cannot create the folder", keeps=workspace
    )
    assert_rejected(
        "--config=tiny.py", "--workdir=words.txt/in/it", message="cannot create the folder", keeps=workspace
    )
    assert_rejected("--config=tiny.py", "--workdir=/proc/run", message="cannot create the folder /proc/run")


EXPERIMENTS = {
    "def (": "broken.py",
    "x = 1": "get_config",
    "def get_config():\n    return {}": "get_config",
    "def get_config():\n    return None": "get_config",
    "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass C:\n  a: int = 1\ndef get_config():\n  return C()": (
        "get_config() must return an attnlab.train.Experiment, not a "
    ),
    "from attnlab.train import Experiment\ndef get_config():\n    return Experiment(model=None, data=None)": "broken.py",
    "import nothing_like_it\ndef get_config(): pass": "nothing_like_it",
    "def get_config():\n    return 1 / 0": "ZeroDivisionError",
}


@pytest.mark.parametrize("source", EXPERIMENTS, ids=range(len(EXPERIMENTS)))
def test_invalid_experiment_file_is_rejected(workspace, assert_rejected, source):
    (workspace / "broken.py").write_text(source)
    assert_rejected("--config=broken.py", "--workdir=new", message=EXPERIMENTS[source])
    assert not (workspace / "new").exists() or not list((workspace / "new").iterdir())


# Damaged checkpoints -----------------------------------------------------------------------------


def truncate(checkpoint):
    """Truncate every array file to half its size, as a power failure may."""
    files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_truncated_checkpoint_falls_back_to_previous(workspace, capfd):
    run = workspace / "run"
    truncate(run / "checkpoints" / "4")
    before = file_contents(run / "checkpoints" / "4")
    assert call("--mode=eval", "--workdir=run") == 0  # read-only: no checkpoint is moved
    out, err = capfd.readouterr()
    assert (
        "checkpoint 4 is damaged" in out
        and "restoring checkpoint 2 instead" in out
        and "step 2: loss" in out
        and err == ""
    )
    assert file_contents(run / "checkpoints" / "4") == before
    assert call("--workdir=run") == 0
    out, err = capfd.readouterr()
    assert "checkpoint 4 is damaged" in out and "resuming at step 2" in out and err == ""
    assert {p.relative_to(run / "damaged" / "4"): x for p, x in file_contents(run / "damaged").items()} == {
        p.relative_to(run / "checkpoints" / "4"): x for p, x in before.items()
    }
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3, 4]
    assert call("--mode=eval", "--workdir=run") == 0
    assert "step 4: loss" in capfd.readouterr().out


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_run_with_only_damaged_checkpoints_is_rejected(workspace, assert_rejected, mode):
    for step in (2, 4):
        truncate(workspace / "run" / "checkpoints" / str(step))
    assert_rejected(f"--mode={mode}", "--workdir=run", message="checkpoint 4 under", keeps=workspace / "run")


# Full disks --------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Fill the file system up to `leave` free bytes."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize - leave
    (folder / "filler").write_bytes(b"x" * size)


def test_full_disk_at_start_is_reported(workspace, assert_rejected):
    with small_disk(workspace / "disk", "64k") as disk:
        fill(disk, 0)
        assert_rejected(
            "--config=tiny.py", f"--workdir={disk / 'run'}", message=["disk", "No space left on device"]
        )


@pytest.fixture
def no_delays(monkeypatch):
    """Repeat failed writes at once."""
    for module in (storage, loop):
        monkeypatch.setattr(module, "RETRY_DELAYS", (0.0, 0.0))


def test_full_disk_during_training_keeps_earlier_checkpoints(workspace, assert_rejected, capfd, no_delays):
    with small_disk(workspace / "disk", "1m") as disk:
        run = disk / "run"
        small = [
            "--config=tiny.py",
            f"--workdir={run}",
            "--config.train.keep=1000",
            "--config.train.steps=1000",
        ]
        out = assert_rejected(
            *small,
            "--config.train.checkpoint_every=1",
            message=["could not be written", "No space left on device"],
            expected=1,
        )
        assert "done" not in out
        assert "warning: " in out
        assert call("--mode=eval", f"--workdir={run}") == 0
        out, err = capfd.readouterr()
        assert "loss" in out and err == ""


def test_full_disk_keeps_metrics(workspace, assert_rejected):
    with small_disk(workspace / "disk", "2m") as disk:
        run = disk / "run"
        assert call("--config=tiny.py", f"--workdir={run}") == 0
        step = max(int(p.name) for p in (run / "checkpoints").iterdir())
        fill(disk, 0)
        lines = metrics(run)
        assert_rejected(f"--workdir={run}", "--config.train.steps=400", "--config.train.checkpoint_every=400",
                "--config.train.eval_every=400", message=[str(run), "No space left on device"])  # fmt: skip
        (disk / "filler").unlink()
        assert metrics(run)[: len(lines)] == lines
        assert call(f"--workdir={run}", f"--config.train.steps={step + 2}") == 0
        assert [line["step"] for line in metrics(run, "train")] == list(range(1, step + 3))


# In a subprocess ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=tiny.py", "--mesh=data:3"], "data.batch_size=8 cannot be sharded 3 ways"),
        (["--config=tiny.py", "--mesh=data:16"], "needs 16 devices and there is 1"),
        (["--mode=sample", "--workdir=run", "--prompt=longer than the context"], "the prompt has 24 tokens"),
    ],
)
def test_program_rejects_invalid_arguments(workspace, arguments, message):
    done = program(*arguments, cwd=workspace)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_parameters_that_are_too_large_are_rejected(workspace, assert_rejected):
    """XLA would abort the process."""
    arguments = ("--mode=describe", "--config=tiny.py", "--config.model.width=1000000000")
    assert_rejected(*arguments, message="a dimension can be at most 2,147,483,647")


@pytest.mark.parametrize(
    "source, code, message",
    [
        ("import builtins; del builtins.print", 2, "error: odd.py:4: NameError"),
        (
            "import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
            0,
            "error: unexpected ZeroDivisionError",
        ),
    ],
    ids=["no print", "thread"],
)
def test_odd_experiment_file_prints_no_traceback(workspace, source, code, message):
    (workspace / "odd.py").write_text(f"{source}\n{(workspace / 'tiny.py').read_text()}")
    done = program("--mode=describe", "--config=odd.py", cwd=workspace)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_nan_loss_prints_one_line_and_exits_1(workspace, capfd):
    run = workspace / "nan"
    big = [
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip_norm=none",
        "--config.train.steps=50",
    ]
    assert call("--config=tiny.py", f"--workdir={run}", *big) == 1
    out, err = capfd.readouterr()
    assert err.startswith("error: step ") and err.count("\n") == 1
    assert "the first non-finite tensor is the " in err
    assert "done" not in out


def test_invalid_arguments_are_distinct():
    """Every row of the table has different arguments."""
    assert all(a != b for a, b in itertools.combinations([json.dumps(m[0]) for m in INVALID_ARGUMENTS], 2))
    assert len(INVALID_ARGUMENTS) >= 40
