"""Run `launch/slurm.sh` on a real SLURM of one node, started in a temporary folder.

    python -m tests.slurm

A job of two tasks on CPUs trains a small model. It is stopped by `scancel --signal`, by a job of a
higher priority, by its time limit and by `scancel`. Each time it must save a checkpoint and resume
at the step where it stopped. It takes five minutes and needs `apt install slurm-wlm munge`.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.jobs import free_port
from tests.programs import ROOT, environment, metrics, write_tiny

DAEMONS, COMMANDS = ("munged", "slurmctld", "slurmd"), ("sbatch", "scancel", "squeue", "srun", "scontrol")
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # often not in the PATH of a user
TASKS = 2
# No cgroups, so that it runs in a container. SLURM starts a requeued job after `cred_expire`.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={second_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={tasks}
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=2
"""


class Failed(Exception):
    """A check failed; the message says which."""


class Slurm:
    """A SLURM of this machine alone. Leaving its context ends it.

    Args:
      folder: an empty folder for its configuration, state and logs.
    """

    def __init__(self, folder: Path):
        self._folder, self._stack = folder, ExitStack()
        self._variables = environment(
            PATH=f"{os.environ['PATH']}:{SYSTEM_FOLDERS}",
            SLURM_CONF=str(folder / "slurm.conf"),
            PYTHON=sys.executable,
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES="1",
            JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"),
        )

    def __enter__(self) -> "Slurm":
        folder, port = self._folder, free_port()
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        values = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "tasks": TASKS}
        text = CONFIGURATION.format(folder=folder, port=port, second_port=port - 1, **values)
        (folder / "slurm.conf").write_text(text)
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        munge |= {"seed-file": "munged.seed", "log-file": "munged.log"}
        self._stack.__enter__()
        self._daemon("munged", "--foreground", *(f"--{name}={folder / file}" for name, file in munge.items()))
        wait_until(lambda: (folder / "munge.socket").exists(), "munged listens", 10)
        self._daemon("slurmctld", "-D", "-i")
        self._daemon("slurmd", "-D")
        wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False), "the node is idle", 30)
        return self

    def __exit__(self, *exception: object) -> None:
        self.run("scancel", f"--user={getpass.getuser()}", check=False)
        self._stack.close()

    def _daemon(self, *command: str) -> None:
        log = self._stack.enter_context((self._folder / f"{command[0]}.out").open("w"))
        process = subprocess.Popen(command, env=self._variables, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM and return its output."""
        done = subprocess.run(
            command, env=self._variables, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise Failed(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Submit a job and return its number."""
        return re.findall(r"\d+", self.run("sbatch", *arguments))[0]

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job)
        return re.findall(r"JobState=(\w+)", fields)[0]


class Run:
    """A training run whose jobs write to one file.

    Args:
      slurm: where its jobs run.
      folder: an empty folder.
    """

    def __init__(self, slurm: Slurm, folder: Path):
        self._slurm, self._folder = slurm, folder
        self.workdir, self._output, self._read = folder / "run", folder / "output.txt", 0
        write_tiny(folder)
        self._output.touch()

    def submit(self, *options: str) -> str:
        """Submit `launch/slurm.sh` with more options of sbatch, and return the job's number."""
        layout = ["--nodes=1", f"--ntasks-per-node={TASKS}", "--cpus-per-task=1", "--gpus-per-node=0"]
        steps = [f"--config.train.{name}=1000000" for name in ("steps", "checkpoint_every", "eval_every")]
        config = [f"--config={self._folder / 'tiny.py'}", f"--workdir={self.workdir}", *steps]
        files = [f"--output={self._output}", f"--chdir={ROOT}"]
        return self._slurm.submit(*layout, *options, *files, str(ROOT / "launch" / "slurm.sh"), *config)

    def wait_for(self, pattern: str, timeout: float = 120) -> str:
        """Wait until the jobs print a line with the pattern; return the pattern's group."""
        found: list[re.Match] = []

        def printed() -> bool:
            found[:] = re.finditer(pattern, self._output.read_text()[self._read :])
            return bool(found)

        wait_until(printed, f"the job prints {pattern!r}", timeout)
        self._read += found[0].end()
        return found[0][1]

    def train(self, steps: int = 20) -> None:
        """Wait until some more steps are done."""
        start = len(self._steps())
        wait_until(lambda: len(self._steps()) >= start + steps, f"the job trains for {steps} steps", 120)

    def _steps(self) -> list[int]:
        file = self.workdir / "metrics.jsonl"
        return [line["step"] for line in metrics(self.workdir, "train")] if file.exists() else []

    def check_stop(self, name: str) -> str:
        """Check that the run stops with a checkpoint of the step that it prints; return it."""
        step = self.wait_for(r"stopped by a signal at step (\d+), saved")
        wait_until(lambda: self._steps()[-1] == int(step), f"the metrics end at step {step}", 10)
        if self._steps() != list(range(1, int(step) + 1)):
            raise Failed(f"{name}: the metrics do not contain each step up to {step} once")
        if not (self.workdir / "checkpoints" / step).is_dir():
            raise Failed(f"{name}: there is no checkpoint of step {step}")
        print(f"{name}: saved at step {step}", flush=True)
        return step

    def check_resumes(self, step: str) -> None:
        """Check that the run resumes where it stopped, as one job of all tasks."""
        resumed = self.wait_for(rf"resuming at step (\d+) in .* on mesh data:{TASKS} \({TASKS} cpu devices\)")
        if resumed != step:
            raise Failed(f"the run stopped at step {step} and resumed at step {resumed}")
        print(f"resumed at step {step}", flush=True)
        self.train()


def wait_until(condition: Callable[[], bool], name: str, timeout: float) -> None:
    """Wait for a condition.

    Raises:
      Failed: it is not true after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout:.0f} seconds: {name}")
        time.sleep(0.2)


def check(slurm: Slurm, run: Run) -> None:
    """Stop a run in all ways in which SLURM stops a job.

    Raises:
      Failed: it does not save or resume.
    """
    job = run.submit()
    run.wait_for(rf"(training) in .* on mesh data:{TASKS} \({TASKS} cpu devices\)")
    print(f"{TASKS} tasks joined one job", flush=True)
    run.train()
    slurm.run("scancel", "--signal=USR1", job)
    run.check_resumes(run.check_stop("scancel --signal=USR1"))
    slurm.submit("--partition=high", "--output=/dev/null", f"--ntasks={TASKS}", "--wrap=sleep 1")
    run.check_resumes(run.check_stop("a job of a higher priority"))
    slurm.run("scancel", job)
    step = run.check_stop("scancel")
    wait_until(lambda: slurm.state(job) == "CANCELLED", "the job is cancelled", 60)
    # SLURM checks time limits every 30 seconds: the signal comes 25 to 55 seconds after the start.
    job = run.submit("--time=1", "--signal=USR1@5")
    run.check_resumes(step)
    run.check_resumes(run.check_stop("the time limit"))
    slurm.run("scancel", job)
    run.check_stop("scancel")


def main() -> int:
    """Run the checks and return the exit code: 1 if one fails, 2 without SLURM."""
    path = f"{os.environ['PATH']}:{SYSTEM_FOLDERS}"
    if missing := [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]:
        print(f"error: no {', '.join(missing)} here; apt install slurm-wlm munge", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="attnlab-slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # munged refuses other permissions of the folder of its socket
        run_folder = folder / "job"
        try:
            with Slurm(folder) as slurm:
                check(slurm, Run(slurm, run_folder))
        except Failed as failure:
            for file in (folder / "slurmctld.out", folder / "slurmd.out", run_folder / "output.txt"):
                if file.exists():
                    print(f"--- {file.name}", *file.read_text().splitlines()[-20:], sep="\n")
            print(f"error: {failure}", file=sys.stderr)
            return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
