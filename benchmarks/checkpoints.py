"""Time the save of a checkpoint with digests against Orbax's alone, and training while it saves.

    python benchmarks/checkpoints.py                          # 200 MB, 5 rounds
    python benchmarks/checkpoints.py --megabytes 50 --rounds 3
    python benchmarks/checkpoints.py --training               # steps with and without saves

Saves write the same random float32 arrays, wait until these are on disk, and delete them. The
check of the digests is timed too. With `--training`, a language model takes 10 steps; with saves,
one of the full state begins before them, and Orbax writes it in the background.
"""

import argparse
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from timing import alternate, environment, table
from train_step import Shape, attnlab_batch, attnlab_session, random_batch

from attnlab.train import digests
from attnlab.train.checkpoints import Checkpoints

STEPS = 10  # between two saves


def state(megabytes: int) -> dict[str, jax.Array]:
    """Return 16 arrays of `megabytes` in all."""
    keys = jax.random.split(jax.random.key(0), 16)
    return {f"layer{i}": jax.random.normal(key, (megabytes, 16, 1024)) for i, key in enumerate(keys)}


def time_training(rounds: int) -> None:
    """Print a table of training steps without saves, and with a save before every `STEPS` steps."""
    shape, saved = Shape(), itertools.count(1)
    session = attnlab_session(shape)
    state, batch = session.new_state(), session.to_devices(attnlab_batch(*random_batch(shape)))
    print(environment("jax", "orbax-checkpoint"))
    print(f"state of {sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6:.0f} MB, {shape}")
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:

        def steps() -> jax.Array:
            nonlocal state
            for _ in range(STEPS):
                state, metrics = session.train_step(state, batch)
            return metrics["loss"]

        def steps_and_save() -> jax.Array:
            checkpoints.save(next(saved), state, {})
            return steps()

        seconds = alternate({"without saves": steps, "with saves": steps_and_save}, rounds, steps=1, warmup=1)
    print(table(seconds, STEPS, "steps"))
    ratio = np.median(seconds["with saves"] / seconds["without saves"])
    print(f"with saves / without: {ratio:.2f} (target: at most 1.1)")


def main() -> None:
    """Print a table of the two saves and of the check, in MB/s."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training", action="store_true", help="time training steps instead")
    arguments = parser.parse_args()
    if arguments.training:
        return time_training(arguments.rounds)
    arrays, steps = state(arguments.megabytes), itertools.count()
    print(environment("jax", "orbax-checkpoint"))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:

        def save_with_digests() -> None:
            checkpoints.save(next(steps), arrays, {})
            checkpoints.wait()

        def save_with_orbax() -> None:
            ocp.save(epath.Path(folder) / "orbax", arrays, overwrite=True)

        def check() -> None:
            digests.check(checkpoints.root / str(checkpoints.steps()[-1]))

        jax.block_until_ready(jax.tree.map(jnp.sum, arrays))
        names = {"Orbax": save_with_orbax, "with digests": save_with_digests, "check digests": check}
        print(table(alternate(names, arguments.rounds, steps=1, warmup=1), arguments.megabytes, "MB"))


if __name__ == "__main__":
    main()
