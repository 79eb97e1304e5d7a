"""Time the host's part of a training step: the training loop around a step that computes nothing.

    python benchmarks/null_step.py                  # the experiment pronoun
    python benchmarks/null_step.py --config lm_docs --steps 60

Both loops are the real one, with the experiment's input and log lines. The null step returns its
state, and constants for the metrics. While it takes less time than the experiment's own
step, the devices do not wait for the host.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import environment, table

from attnlab import config, sharding
from attnlab.train.loop import Limits, TrainingLoop
from attnlab.train.session import Session

ROOT = Path(__file__).resolve().parents[1]


class Record:
    """A writer of metrics that keeps the times of its rows, and checkpoints that save nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Keep the time of a row of training metrics."""
        if split == "train":
            self.times.append(time.perf_counter())

    def save(self, *arguments: Any) -> None:
        """Save nothing."""

    def has_metrics(self, step: int) -> bool:
        """Return that the evaluation of a step is not saved."""
        return False

    def failed(self) -> bool:
        """Return that no save failed."""
        return False

    def wait(self) -> None:
        """Wait for nothing."""


def null_step(session: Session, metrics: dict[str, jax.Array]):
    """Return a step that adds 1 to the step number, with metrics of these shapes."""

    @jax.jit
    def constants(number):
        return number + 1, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), metrics)

    def step(state, batch):
        with session.use_mesh():
            number, metrics = constants(state.step)
        return dataclasses.replace(state, step=number), metrics

    return step


def seconds_per_step(session: Session, steps: int, log_every: int) -> float:
    """Return the seconds of a step of the training loop, without the first `log_every` steps."""
    record = Record()
    experiment = session.experiment
    loop = TrainingLoop(
        session=session,
        batches=experiment.data.train_iterator(session.tokenizer, seed=0),
        validation=experiment.data.eval_batches("validation", session.tokenizer, limit=1),
        checkpoints=record,  # type: ignore[arg-type]
        writer=record,
        limits=Limits(max_steps=steps + log_every),
        profile_dir="",
        log=lambda text: None,
    )
    loop.run(session.new_state())
    return (record.times[-1] - record.times[1]) / steps  # rows of steps 1, log_every, 2 log_every, ...


def main() -> None:
    """Print a table of the loop with the experiment's step and with the null step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="pronoun")
    parser.add_argument("--steps", type=int, default=200, help="steps per timing, a multiple of 10")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    experiment = config.load(str(ROOT / "experiments" / f"{arguments.config}.py")).config
    never = {"log_every": 10, "eval_every": 10**9, "checkpoint_every": 10**9, "steps": 10**9}
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **never))
    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    tokenizer = experiment.data.build_tokenizer()
    real, null = Session(experiment, mesh, tokenizer), Session(experiment, mesh, tokenizer)
    batch = next(experiment.data.train_iterator(tokenizer, seed=0))
    _, metrics = real.train_step(real.new_state(), real.to_devices(batch))
    null.__dict__["train_step"] = null_step(null, metrics)  # hides the cached property
    sessions = {"experiment's step": real, "null step": null}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(arguments.rounds):
        for name in sorted(sessions, reverse=bool(turn % 2)):
            seconds[name].append(seconds_per_step(sessions[name], arguments.steps, 10))
    print(environment("jax", "jaxlib"))
    print(table(seconds, 1, "steps"))
    share = np.median(np.divide(seconds["null step"], seconds["experiment's step"]))
    print(f"host / step: {share:.3f}")


if __name__ == "__main__":
    main()
