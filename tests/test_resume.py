"""A run that is killed, stopped or moved to another mesh resumes with the same results."""

import os
import random
import re
import shlex
import signal
import subprocess
import time

import jax
import pytest

from tests.programs import call, command, environment, metrics, program, write_tiny

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


def last_logged_step(workdir):
    try:
        return max((line["step"] for line in metrics(workdir, "train")), default=0)
    except (FileNotFoundError, ValueError):  # no file yet, or a partial line
        return 0


def partial_checkpoints(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


def kill(arguments, workdir, after, rng, while_saving):
    """Start a run and kill it after a step: at a random moment, or while it saves."""
    child = subprocess.Popen(
        command(*arguments, f"--workdir={workdir}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 240
    while last_logged_step(workdir) < after or (while_saving and not partial_checkpoints(workdir)):
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline, "no step was reached"
        time.sleep(0.001)
    if not while_saving:
        time.sleep(rng.random() * 0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return bool(partial_checkpoints(workdir))


def sha256(workdir, mesh):
    done = program("--mode=describe", f"--workdir={workdir}", f"--mesh={mesh}")
    assert (done.returncode, done.stderr) == (0, "")
    return re.search(r"^params_sha256: ([0-9a-f]{64})$", done.stdout, re.MULTILINE)[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["single", "data:2,fsdp:2,tensor:2"])
def test_resume_after_sigkill_repeats_bits(tiny, tmp_path, mesh):
    arguments = [*tiny, f"--mesh={mesh}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = program(*arguments, f"--workdir={straight}")
    assert (done.returncode, done.stderr) == (0, "")

    rng = random.Random(int(os.environ.get("ATTNLAB_TEST_SEED", "0")))
    moments = sorted(rng.sample(range(4, STEPS - 10), 3))
    within = [kill(arguments, killed, step, rng, while_saving=i == 1) for i, step in enumerate(moments)]
    assert within[1], "the kill during a save left no partial checkpoint"
    done = program(*arguments, f"--workdir={killed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming at step" in done.stdout
    assert not partial_checkpoints(killed)

    assert curve(killed) == curve(straight)
    assert [line["step"] for line in metrics(killed, "train")] == list(range(1, STEPS + 1))
    assert sha256(killed, mesh) == sha256(straight, mesh)


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
    assert (child.returncode, err) == (0, "")
    step = int(re.search(r"stopped by a signal at step (\d+), saved", out)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, step + 1))
    resume = shlex.split(re.search(r"resume with: (.*)", out)[1])
    assert resume[0] == "python"
    done = program(*resume[2:], f"--max_steps={step + 2}")
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step} " in done.stdout
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, step + 3))


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


def test_max_steps_stops_and_resumes(tiny, capfd):
    assert call(*tiny, "--workdir=run", "--max_steps=4") == 0
    out, err = capfd.readouterr()
    assert "max steps at step 4" in out
    assert err == ""
    assert call("--workdir=run", "--max_steps=2") == 0  # already past: no step runs and nothing is lost
    assert "max steps at step 4" in capfd.readouterr().out
    assert call("--workdir=run", "--max_steps=7") == 0
    assert "resuming at step 4" in capfd.readouterr().out
    assert [line["step"] for line in metrics("run", "train")] == list(range(1, 8))
    assert [line["step"] for line in metrics("run", "eval")] == [4, 7]


def test_max_time_stops_with_checkpoint(tiny, tmp_path, capfd):
    assert call(*tiny, "--workdir=run", "--config.train.steps=1000000", "--max_time=3s") == 0
    out, err = capfd.readouterr()
    step = int(re.search(r"max time at step (\d+)", out)[1])
    assert err == ""
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert metrics("run", "train")[-1]["step"] == metrics("run", "eval")[-1]["step"] == step
