"""A run that is killed again and again must end with the bytes of one that was not disturbed.

The kills hit the preparation of the data, the first compilation, saves and the report: at random
moments, or shortly after a file appears. Every fourth process is a new interpreter; the others are
forked, which saves the time of the imports, during which nothing is written.
"""

import hashlib
import json
import signal
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.harness import Harness, digests_in
from tests.faults.process import Result, Running, command_line, fork, spawn

EXPERIMENT = '''"""A small model of a prepared data set, with a report."""

import time
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from attnlab.data import Bytes, Data
from attnlab.data.prepare import prepared
from attnlab.data.tfds_text import TextColumn
from attnlab.layers import AttentionConfig, MLPConfig
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Constant, Experiment, Train


class Counted(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "validation")}

    def _generate_examples(self):
        for i in range(100):
            time.sleep(0.005)
            yield i, {"text": f"{i} and {i * i} and {i * 7919 % 1000} " * 4}


@dataclass(frozen=True, kw_only=True)
class Numbers(Data):
    tokenizer: Bytes = Bytes()

    def records(self, split):
        return TextColumn(prepared(Counted).as_data_source(split=split), "text")


def get_config():
    return Experiment(
        model=DecoderConfig(depth=1, width=16, attention=AttentionConfig(heads=2), feed_forward=MLPConfig(width=32)),
        data=Numbers(sequence_length=32, batch_size=8),
        optimizer=AdamW(learning_rate=1e-2, schedule=Constant(warmup=2)),
        train=Train(steps=90, log_every=1, eval_every=30, eval_batches=2, checkpoint_every=3, keep=3),
    )


def report(trained):
    Path("reporting").touch()
    time.sleep(0.3)
    trained.claim("loss", 1.0, "<", 2.0)
    return {"answer": 42.0}
'''
# What to wait for before a kill: a pattern of files in the folder of the case. None waits for
# nothing, so that any moment of the first seconds is hit.
STARTS = (None, "data/format-*/.preparing-*", "run/checkpoints", "run/config.json", "run/tokenizer.json")
SAVES = (None, "run/checkpoints/*tmp*", "run/checkpoints/*tmp*", "run/checkpoints/?", "run/checkpoints/??")
REPORTS = ("reporting", "reporting", "run/report.json")
# These numbers of a row of metrics depend on the speed of the machine.
TIMES = (
    *("time", "tokens_per_second", "model_flops_per_second", "model_flops_utilization", "input_wait"),
    *("goodput", "compile_share", "input_share", "checkpoint_share", "evaluation_share", "other_share"),
    "slow_steps",
)
# A run from its start to its report may use the CPU time of this many commands.
WHOLE_RUN = {"single": 3, "data:8": 8}
SIGNALS = (signal.SIGKILL,) * 8 + (signal.SIGTERM, signal.SIGINT)


def case(mesh: str, rng: Random, harness: Harness, number: int) -> Result:
    """Kill a run on this mesh `harness.kills` times, finish it, and compare its files."""
    expected = _undisturbed(harness, mesh)
    folder = _new_folder(harness)
    arguments = ["--config=counted.py", "--workdir=run", f"--mesh={mesh}"]
    environ = {"ATTNLAB_DATA_DIR": str(folder / "data")}
    hits: list[str] = []
    for life in range(harness.kills):
        part = (life + 0.5) / harness.kills
        phase = STARTS if part < 0.3 else SAVES if part < 0.8 else REPORTS
        awaited, sent = rng.choice(phase), rng.choice(SIGNALS)
        (folder / "reporting").unlink(missing_ok=True)
        fresh = rng.random() < 0.25
        run = spawn(arguments, folder, environ) if fresh else fork(command_line(arguments), folder, environ)
        _wait_for(run, folder, awaited, rng)
        if fresh or not (folder / "run").exists():  # the command line may not have begun
            sent = signal.SIGKILL
        ended = run.ended()
        run.kill(sent)
        outcome = run.wait(WHOLE_RUN[mesh])
        hits.append(f"{sent.name} at {awaited}")
        killed = outcome.code == -sent and not outcome.err.strip()
        if (ended or not killed) and outcome.result("").verdict != "clean":
            return outcome.result(f"{mesh}: after {', '.join(hits)}")
    outcome = harness.run(folder, arguments, environ=environ, limit=WHOLE_RUN[mesh])
    if outcome.code == 0 and not outcome.limit:
        found = _contents(harness, folder, mesh)
        return outcome.result(f"{mesh}: after {', '.join(hits)}", _differences(expected, found))
    return outcome.result(f"{mesh}: after {', '.join(hits)}")


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the names of the differing files, with the first differing lines of the metrics."""
    wrong = [f"other {name}" for name in expected if name != "metrics" and found[name] != expected[name]]
    # A run that SIGTERM stops adds a row of its last step.
    rows = [(line["step"], line["split"]) for line in found["metrics"]]
    if absent := [line for line in expected["metrics"] if line not in found["metrics"]]:
        wrong.append(f"no row {absent[0]}")
    if twice := sorted({row for row in rows if rows.count(row) > 1}):
        wrong.append(f"two rows of {twice[0]}")
    return ", ".join(wrong)


single, eight_devices = partial(case, "single"), partial(case, "data:8")


def _wait_for(run: Running, folder: Path, awaited: str | None, rng: Random) -> None:
    """Wait until a new file appears, and a little longer, or for a random time."""
    before = set(folder.glob(awaited)) if awaited else set()
    soon = awaited is None or (before and "*" not in awaited and "?" not in awaited)
    start, limit = time.monotonic(), rng.random() * 5 if soon else 60
    while not run.ended() and time.monotonic() - start < limit:
        if awaited and set(folder.glob(awaited)) - before:
            time.sleep(rng.choice((0, 0.01, 0.1, 0.4)) * rng.random())
            return
        time.sleep(0.002)


def _new_folder(harness: Harness) -> Path:
    folder = harness.folder("kills")
    (folder / "counted.py").write_text(EXPERIMENT)
    return folder


def _undisturbed(harness: Harness, mesh: str) -> dict[str, Any]:
    """Return the contents of a run that was not killed; it is made once per mesh."""
    made = harness.__dict__.setdefault("undisturbed", {})
    if mesh not in made:
        folder = _new_folder(harness)
        arguments = ["--config=counted.py", "--workdir=run", f"--mesh={mesh}"]
        environ = {"ATTNLAB_DATA_DIR": str(folder / "data")}
        outcome = harness.run(folder, arguments, environ=environ, limit=WHOLE_RUN[mesh])
        assert outcome.code == 0, f"without any fault, {arguments} ended with {outcome}"
        made[mesh] = _contents(harness, folder, mesh)
    return made[mesh]


def _contents(harness: Harness, folder: Path, mesh: str) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on kills."""
    environ = {"ATTNLAB_DATA_DIR": str(folder / "data")}
    describe = ["--mode=describe", "--workdir=run", f"--mesh={mesh}"]
    described = harness.run(folder, describe, environ=environ, limit=WHOLE_RUN[mesh])
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in TIMES:
            line.pop(name, None)
    return {
        "parameters": digests_in(described.out),
        "metrics": lines,
        "report": (run / "report.json").read_text(),
        "checkpoints": sorted(file.name for file in (run / "checkpoints").iterdir()),
        "tokenizer": hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest(),
        "damaged checkpoints": (run / "damaged").exists(),
        "left-overs of preparation": sorted(file.name for file in (folder / "data").glob("*/.prep*")),
    }
