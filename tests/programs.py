"""Helpers that run the command line in tests, in this process or in a subprocess."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import run
from attnlab.runner import cli
from tests.compilation import FAST_COMPILATION, default_environment

ROOT = Path(run.__file__).parent
COMPILED = "ATTNLAB_TEST_COMPILED"  # the folder of the compiled programs that subprocesses share
TINY = '''"""A language model of a few hundred parameters."""

from attnlab.data import Bytes, Text
from attnlab.layers import AttentionConfig, MLPConfig
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Constant, Experiment, Train


def get_config():
    return Experiment(
        model=DecoderConfig(depth=2, width=16, attention=AttentionConfig(heads=4, kv_heads=2), feed_forward=MLPConfig(width=32)),
        data=Text(name="text:{text}", tokenizer=Bytes(), sequence_length=16, batch_size=8),
        optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=2)),
        train=Train(steps=4, log_every=1, eval_every=2, eval_batches=2, checkpoint_every=2, keep=3),
    )
'''


def write_text(path, lines=200, seed=0):
    """Write random sentences over a small vocabulary: quick to learn, impossible to memorize."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and then it saw one red dog who ran home by sea".split()
    path.write_text("".join(" ".join(rng.choices(words, k=8)) + "\n" for _ in range(lines)))
    return path


def write_tiny(folder):
    """Write the tiny experiment file and its text into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "words.txt")
    (folder / "tiny.py").write_text(TINY.replace("{text}", str(text)))
    return folder / "tiny.py"


def call(*arguments):
    """Run the command line in this process and return its exit code."""
    return cli.main(["run.py", *map(str, arguments)])


def environment(**variables):
    """Return the environment of a subprocess, with additional variables.

    The number of devices is not inherited, torch is hidden (TensorBoard's writer would import it),
    and XLA's most expensive passes are disabled, as in the test process. Subprocesses of a test
    session share their compiled programs, since tests start runs of the same small model often.
    """
    hidden = Path(__file__).parent / "without_torch"
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "PYTHONPATH")}
    defaults = {
        "PYTHONPATH": str(hidden),
        "PYTHONWARNINGS": "ignore",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if folder := os.environ.get(COMPILED):
        defaults["JAX_COMPILATION_CACHE_DIR"] = folder
    return inherited | defaults | variables


def command(*arguments):
    return [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]


def program(*arguments, cwd=None, timeout=300, **variables):
    """Run the command line in a subprocess and return the completed process."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
    )


def run_python_json(code, *arguments, timeout=600, **variables):
    """Run Python code in a subprocess and return its last output line, parsed as JSON.

    `variables` are added to its environment.
    """
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=default_environment() | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout.splitlines()[-1])


def metrics(workdir, split=None):
    """Return the lines of a run's metrics.jsonl without their time, which differs between runs."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return [line for line in lines if split in (None, line["split"])]


def last_logged_step(workdir):
    """Return the last training step in the metrics of a run, which may be running; 0 if none."""
    try:
        return max((line["step"] for line in metrics(workdir, "train")), default=0)
    except (FileNotFoundError, ValueError):  # no file yet, or a partial line
        return 0
