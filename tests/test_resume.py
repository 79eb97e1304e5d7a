"""A run that is killed, stopped or moved to another mesh resumes with the same results."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest

from attnlab.runner.exit_codes import ExitCode
from attnlab.train.loop import Diverged, TrainingLoop
from tests.programs import call, command, environment, last_logged_step, metrics, program, write_tiny
from tests.selection import long

STEPS = 60


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return the arguments of a run with a checkpoint every third step."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    every = [
        f"--config.train.{name}" for name in ("steps=60", "checkpoint_every=3", "eval_every=20", "keep=2")
    ]
    return ["--config=tiny.py", *every]


def curve(workdir):
    return {(line["step"], line["split"]): line["loss"] for line in metrics(workdir)}


def partial_checkpoints(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


def kill(arguments, workdir, moment, rng):
    """Start a run and kill it: in its first compilation, during a save, or after a step."""
    child = subprocess.Popen(
        command(*arguments, f"--workdir={workdir}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    reached = {
        "compilation": lambda: (workdir / "config.json").exists(),
        "save": lambda: partial_checkpoints(workdir) and list((workdir / "checkpoints").glob("*[0-9]")),
    }.get(moment, lambda: last_logged_step(workdir) >= moment)
    deadline = time.monotonic() + 240
    while not reached():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline, f"{moment} was not reached"
        time.sleep(0.001)
    if moment != "save":
        time.sleep(rng.random() * 0.1)
    child.kill()
    child.wait()


def sha256(workdir, mesh):
    done = program("--mode=describe", f"--workdir={workdir}", f"--mesh={mesh}")
    assert (done.returncode, done.stderr) == (0, "")
    return re.search(r"^params_sha256: ([0-9a-f]{64})$", done.stdout, re.MULTILINE)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "moments"),
    [
        # `tests.faults` kills runs on one device in CI.
        long("single", ["compilation", "save"]),
        ("data:2,fsdp:2,tensor:2", [20]),
    ],
)
def test_resume_after_sigkill_repeats_bits(tiny, tmp_path, mesh, moments):
    arguments = [*tiny, f"--mesh={mesh}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = program(*arguments, f"--workdir={straight}")
    assert (done.returncode, done.stderr) == (0, "")

    rng = random.Random(int(os.environ.get("ATTNLAB_TEST_SEED", "0")))
    for moment in moments:
        kill(arguments, killed, moment if isinstance(moment, str) else rng.randrange(4, STEPS - 10), rng)
    done = program(*arguments, f"--workdir={killed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming at step" in done.stdout
    assert not partial_checkpoints(killed)

    assert curve(killed) == curve(straight)
    assert [line["step"] for line in metrics(killed, "train")] == list(range(1, STEPS + 1))
    assert sha256(killed, mesh) == sha256(straight, mesh)


def test_run_killed_before_its_first_checkpoint_starts_anew(tiny, tmp_path, monkeypatch, capfd):
    """Every prefix of the files that a run writes before its first step."""

    def stop(_, state):
        assert int(state.step) == 0
        raise Diverged("reached the first step")

    monkeypatch.setattr(TrainingLoop, "run", stop)
    assert call(*tiny, "--workdir=whole") == ExitCode.FAILED
    files = sorted((p for p in Path("whole").rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    names = [str(path.relative_to("whole")) for path in files]
    assert {"config.json", "tokenizer.json"} <= set(names)
    for count in range(len(names) + 1):
        run = Path(f"killed{count}")
        (run / "checkpoints" / "1.tmp" / "state").mkdir(parents=True)
        for path, name in zip(files[:count], names, strict=False):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, run / name)
        (run / ".config.json.7.tmp").write_text("{")
        capfd.readouterr()
        assert call(*tiny, f"--workdir={run}") == ExitCode.FAILED
        out, err = capfd.readouterr()
        assert err == "error: reached the first step\n", names[:count]
        first = "starting tiny in" if "config.json" in names[:count] else "new run of tiny"
        assert out.startswith(first) and "training in" in out
        assert not list((run / "checkpoints").iterdir())


def test_sigterm_saves_and_prints_resume_command(tiny, tmp_path):
    child = subprocess.Popen(
        command(
            *tiny, "--config.train.steps=100000", "--config.train.checkpoint_every=100000", "--workdir=run"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while last_logged_step(tmp_path / "run") < 5:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (ExitCode.PREEMPTED, "")
    step = int(re.search(r"stopped by a signal at step (\d+), saved", out)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, step + 1))
    resume = shlex.split(re.search(r"resume with: (.*)", out)[1])
    assert resume[0] == "python"
    done = program(*resume[2:], f"--max_steps={step + 2}")
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step} " in done.stdout
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, step + 3))


@pytest.mark.slow
def test_resume_on_another_mesh_repeats_losses(tiny, tmp_path):
    assert len(jax.devices()) == 8
    tiny += ["--config.train.steps=18", "--config.train.eval_every=100"]
    assert call(*tiny, "--workdir=straight") == 0
    for mesh, stop in (("single", 6), ("data:8", 12), ("single", 18)):
        assert call(*tiny, "--workdir=moved", f"--mesh={mesh}", f"--max_steps={stop}") == 0
    expected, moved = ([x["loss"] for x in metrics(name, "train")] for name in ("straight", "moved"))
    assert len(expected) == len(moved) == 18
    assert moved == pytest.approx(expected, abs=1e-4)
    assert moved[0] - moved[-1] > 0.5


def test_max_steps_stops_and_resumes(tiny, tmp_path, capfd):
    assert call(*tiny, "--workdir=run", "--max_steps=4") == 0
    out, err = capfd.readouterr()
    assert "max steps at step 4" in out
    assert err == ""
    assert call("--workdir=run", "--max_steps=2") == 0  # already past: no step runs and nothing is lost
    assert "max steps at step 4" in capfd.readouterr().out
    saved = (tmp_path / "run" / "config.json").read_bytes()
    assert call("--workdir=run", "--config.train.steps=3") == 0
    assert "the run has reached step 4, above config.train.steps=3" in capfd.readouterr().out
    assert (tmp_path / "run" / "config.json").read_bytes() == saved  # it is the config of these steps
    assert call("--workdir=run", "--max_steps=7") == 0
    assert "resuming at step 4" in capfd.readouterr().out
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, 8))
    assert [line["step"] for line in metrics("run", "eval")] == [4, 7]

    words = tmp_path / "words.txt"
    words.write_text(words.read_text().replace("cat", "cot", 1))
    capfd.readouterr()
    assert call("--workdir=run", "--max_steps=8") == 2
    assert "'words.txt' has changed; restore it, or resume with --allow" in capfd.readouterr().err
    assert call("--workdir=run", "--max_steps=8", "--allow_changed_data") == 0
    assert "the input starts again at its first batch" in capfd.readouterr().out
    assert call("--workdir=run", "--max_steps=8") == 0


def test_max_time_stops_with_checkpoint(tiny, tmp_path, capfd):
    assert call(*tiny, "--workdir=run", "--config.train.steps=1000000", "--max_time=3s") == 0
    out, err = capfd.readouterr()
    step = int(re.search(r"max time at step (\d+)", out)[1])
    assert err == ""
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert metrics("run", "train")[-1]["step"] == metrics("run", "eval")[-1]["step"] == step
