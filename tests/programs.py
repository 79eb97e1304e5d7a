"""Running the real program in tests: a tiny experiment, in this process or in one of its own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import run
from attnlab.runner import cli

ROOT = Path(run.__file__).parent
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
    """Random sentences of few words: soon learnt, never by heart."""
    rng = random.Random(seed)
    words = "the cat sat on a mat and then it saw one red dog who ran home by sea".split()
    path.write_text("".join(" ".join(rng.choices(words, k=8)) + "\n" for _ in range(lines)))
    return path


def write_tiny(folder):
    """The experiment file, its text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "words.txt")
    (folder / "tiny.py").write_text(TINY.replace("{text}", str(text)))
    return folder / "tiny.py"


def call(*arguments):
    """The program in this process; its exit code."""
    return cli.main(["run.py", *map(str, arguments)])


def environment(**more):
    """Of a program of its own: only the devices it asks for, no torch, which TensorBoard's writer would load, and
    XLA's most expensive passes off, as in the tests' own process.
    """
    hidden = Path(__file__).parent / "without_torch"
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "PYTHONPATH")}
    ours = {"PYTHONPATH": str(hidden), "PYTHONWARNINGS": "ignore", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return inherited | ours | more


def command(*arguments):
    return [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]


def program(*arguments, cwd=None, timeout=300, **more):
    """The program in a process of its own, to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(**more)
    )


def told_by(code, *arguments, timeout=600, **more):
    """What Python code in a process of its own prints last, as JSON; `more` goes into its environment."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def metrics(workdir, split=None):
    """The lines of a run's metrics.jsonl, without their time, which no two runs share."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return [line for line in lines if split in (None, line["split"])]
