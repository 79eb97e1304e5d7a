"""Two real processes with four simulated devices each, through the command line."""

import json
import re
import shutil
import signal
import time

import pytest

from tests.jobs import EXPERIMENT, FLOAT64, job, started
from tests.programs import last_logged_step, metrics, program, write_text
from tests.selection import long

pytestmark = pytest.mark.slow
MESH = "--mesh=data:8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the experiment `small.py`."""
    folder = tmp_path_factory.mktemp("job")
    text = write_text(folder / "words.txt")
    (folder / "small.py").write_text(EXPERIMENT.format(text=text))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """The folder with the run `trained` of two processes."""
    codes, outs, errs = job("--config=small.py", "--workdir=trained", MESH, folder=folder)
    assert codes == [0, 0], errs
    assert "done at step 6" in outs[0] and "step" not in outs[1]
    return folder


def losses(workdir):
    return {(line["step"], line["split"]): line["loss"] for line in metrics(workdir)}


def parameters(folder, workdir):
    """Return the line of `--mode=describe` with the hash of a run's parameters."""
    done = program("--mode=describe", f"--workdir={workdir}", MESH, cwd=folder)
    return next(line for line in done.stdout.splitlines() if line.startswith("params_sha256"))


@pytest.mark.parametrize(
    "mesh",
    [
        "tensor:8",
        *map(long, ("dcn_data:2,fsdp:4", "data:8", "fsdp:2,tensor:4")),
    ],
)
def test_losses_equal_those_of_one_process(folder, mesh):
    """The axis `tensor` of size 8 spans both processes, which then hold the same rows.

    `dcn_data` crosses the two processes; one process has no such axis.
    """
    name = mesh.replace(":", "").replace(",", "")
    arguments = ["--config=small.py", *FLOAT64, "--config.train.steps=30"]
    x64, one_mesh = {"JAX_ENABLE_X64": "1"}, mesh.replace("dcn_", "")
    one = program(*arguments, f"--mesh={one_mesh}", f"--workdir=one-{name}", cwd=folder, **x64)
    assert one.returncode == 0, one.stderr
    codes, _, errs = job(*arguments, f"--mesh={mesh}", f"--workdir=two-{name}", folder=folder, **x64)
    assert codes == [0, 0], errs
    expected, actual = losses(folder / f"one-{name}"), losses(folder / f"two-{name}")
    assert len(expected) > 30
    assert actual == pytest.approx(expected, rel=0, abs=1e-8)


def test_report_is_written_once(trained):
    numbers = json.loads((trained / "trained" / "report.json").read_text())
    assert numbers["tokens"] == 4 and numbers["norm"] > 0
    assert (trained / "trained" / "figures" / "attention.png").stat().st_size > 0
    assert [line["step"] for line in metrics(trained / "trained", "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--mode=eval"], id="eval"),
        pytest.param(["--mode=describe"], id="describe", marks=pytest.mark.long),
        pytest.param(
            ["--mode=sample", "--prompt=the", "--max_new_tokens=4", "--temperature=0"],
            id="sample",
            marks=pytest.mark.long,
        ),
        pytest.param(["--mode=export", "--output_dir={}"], id="export", marks=pytest.mark.long),
    ],
)
def test_modes_print_the_output_of_one_process(trained, arguments):
    one, two = ([text.format(name) for text in arguments] for name in ("exported-one", "exported-two"))
    alone = program(*one, "--workdir=trained", MESH, cwd=trained)
    assert alone.returncode == 0, alone.stderr
    codes, outs, errs = job(*two, "--workdir=trained", folder=trained)
    assert codes == [0, 0], errs
    # Threads of Gloo print pieces of their messages in any order.
    out = re.sub(r"\[Gloo\] Rank |\d* is connected to \d+ peer ranks.*: \d+\n?", "", outs[0])
    expected = alone.stdout.replace("exported-one", "exported-two").splitlines()
    assert [line for line in out.splitlines() if line] == [line for line in expected if line]
    if (trained / "exported-two").exists():
        files = [trained / name / "model.safetensors" for name in ("exported-one", "exported-two")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.long
def test_sweep(folder):
    arguments = ["--config=small.py", "--config.train.steps=2", "--sweep=config.model.depth=1,2"]
    codes, outs, errs = job(*arguments, "--workdir=sweep", MESH, folder=folder)
    assert codes == [0, 0], errs
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [row["error"] for row in rows] == [None, None]
    assert "run 2 of 2" in outs[0] and "run" not in outs[1]


def wait_for_step(workdir, step, timeout=240):
    """Wait until the metrics of a run contain the step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if last_logged_step(workdir) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{workdir} did not reach step {step}")


LONG = ["--config=small.py", MESH, "--config.train.steps=3000", "--config.train.checkpoint_every=50"]


def test_death_of_a_process_ends_the_other(folder):
    with started(*LONG, "--workdir=dead", folder=folder) as (first, second):
        wait_for_step(folder / "dead", 60)
        second.kill()
        _, error = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "process 1 on" in error and "died" in error and "step " in error
    one = program("--workdir=dead", "--config.train.steps=120", cwd=folder)  # continues with one process
    assert one.returncode == 0, one.stderr
    assert "resuming at step" in one.stdout


def test_killed_job_restarts_as_if_undisturbed(folder):
    """With two processes, and with one."""
    options = [
        "--config=small.py",
        MESH,
        *FLOAT64,
        "--config.train.steps=40",
        "--config.train.checkpoint_every=10",
    ]
    x64 = {"JAX_ENABLE_X64": "1"}
    whole, killed, alone = (folder / name for name in ("whole", "killed", "alone"))
    codes, _, errs = job(*options, f"--workdir={whole.name}", folder=folder, **x64)
    assert codes == [0, 0], errs
    with started(*options, f"--workdir={killed.name}", folder=folder, **x64) as processes:
        wait_for_step(killed, 15)
        for process in processes:
            process.kill()
    shutil.copytree(killed, alone)
    codes, _, errs = job(f"--workdir={killed.name}", folder=folder, **x64)
    assert codes == [0, 0], errs
    assert losses(killed) == losses(whole)
    assert parameters(folder, killed.name) == parameters(folder, whole.name)
    one = program(f"--workdir={alone.name}", cwd=folder, **x64)
    assert one.returncode == 0, one.stderr
    assert losses(alone) == pytest.approx(losses(whole), rel=0, abs=1e-8)


def test_stopped_process_is_named_by_the_watchdog(folder):
    arguments = [*LONG, "--workdir=stuck", "--watchdog=40s"]
    with started(*arguments, folder=folder) as (first, second):
        wait_for_step(folder / "stuck", 20)
        second.send_signal(signal.SIGSTOP)
        _, error = first.communicate(timeout=150)
        second.send_signal(signal.SIGCONT)
    assert first.returncode == 1
    assert "process 1 on" in error and "has been silent for" in error


def test_signal_to_one_process_stops_both_at_the_same_step(folder):
    with started(*LONG, "--workdir=preempted", folder=folder) as (first, second):
        wait_for_step(folder / "preempted", 20)
        second.send_signal(signal.SIGUSR1)
        (out, _), _ = first.communicate(timeout=90), second.communicate(timeout=90)
    assert (first.returncode, second.returncode) == (75, 75)
    assert "stopped by a signal at step" in out


def test_missing_process_is_named(folder):
    with started(
        "--config=small.py", "--workdir=missing", "--startup_timeout=2s", folder=folder, count=1
    ) as (first,):
        _, error = first.communicate(timeout=60)
    assert first.returncode == 2
    assert (
        error.startswith("error: the job did not start: 1 of 2 processes") and "missing: process 1" in error
    )
    assert not (folder / "missing").exists() or not list((folder / "missing").iterdir())


def test_different_flags_are_refused(folder):
    from tests.jobs import command, environment, free_port, subprocess

    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                "--config=small.py",
                "--workdir=differ",
                f"--config.train.steps={4 + index}",
                *(f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"),
            ),
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for index in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == 2 and "config.train.steps" in errors[1]
    assert processes[0].returncode in (1, 2) and "process 1" in errors[0]


SLOW_REPORT = """

def report(trained):
    for batch in 1000 * trained.batches("validation", 1):
        trained.predict(batch)
        (trained.workdir / "reporting").touch()
"""


@pytest.mark.parametrize("part", ["evaluation", long("report")])
def test_signal_to_one_process_stops_both_in_the_same(folder, part):
    text = write_text(folder / f"{part}.txt", lines=30_000 if part == "evaluation" else 200)
    experiment = EXPERIMENT.format(text=text).partition("\ndef report")[0] + SLOW_REPORT
    (folder / f"{part}.py").write_text(experiment.replace("eval_batches=2", "eval_batches=None"))
    run = folder / f"stopped-in-{part}"
    arguments = [f"--config={part}.py", f"--workdir={run}", MESH]
    with started(*arguments, folder=folder) as (first, second):
        wait_for_step(run, 3)
        while part == "report" and not (run / "reporting").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second.send_signal(signal.SIGTERM)
        (out, err), (_, other) = first.communicate(timeout=90), second.communicate(timeout=90)
    assert (first.returncode, second.returncode) == (75, 75), (err, other)
    step = 3 if part == "evaluation" else 6
    assert f"stopped by a signal at step {step}, saved; resume with: python " in out
    assert (run / "checkpoints" / str(step)).is_dir()
    assert [line["step"] for line in metrics(run, "eval")] == ([] if part == "evaluation" else [3, 6])
