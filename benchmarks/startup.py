"""Time the start of the command line: `--help`, and the first training step with a compile cache.

    python benchmarks/startup.py                # 5 rounds of `lm_docs`
    python benchmarks/startup.py --config pronoun --rounds 3

Each round starts three processes: `--help`, one with an empty compile cache ("cold"), and one with
the cache of an earlier process ("warm"). The first step includes tracing, compilation and the step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import environment, table

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "run.py")]


def seconds_of_help() -> float:
    """Return the seconds of a process that prints the help."""
    start = time.perf_counter()
    subprocess.run([*RUN, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_of_first_step(config: str, cache: Path) -> tuple[float, float]:
    """Return the seconds from the start of a process to its first step, and those of the step."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [*RUN, f"--config={config}", f"--workdir={workdir}/run", "--max_steps=1"]
        start = compiling = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--config.train.eval_batches=1"],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                if line.startswith("compiling"):
                    compiling = time.perf_counter()
                if line.startswith("step"):
                    end = time.perf_counter()
                    process.kill()
                    return end - start, end - compiling
    raise SystemExit(f"error: {' '.join(command)} ended before its first step")


def main() -> None:
    """Print a table of medians, and the two ratios with their targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="lm_docs")
    arguments = parser.parse_args()
    names = ("--help", "first step, warm", "first step, cold", "process, warm", "process, cold")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        seconds_of_first_step(arguments.config, warm)  # also prepares the data
        for turn in range(arguments.rounds):
            seconds["--help"].append(seconds_of_help())
            caches = {"cold": Path(folder) / f"cold{turn}", "warm": warm}
            for name in sorted(caches, reverse=bool(turn % 2)):
                process, step = seconds_of_first_step(arguments.config, caches[name])
                seconds[f"process, {name}"].append(process)
                seconds[f"first step, {name}"].append(step)
    print(environment("jax", "jaxlib"))
    print(table(seconds, 1, "runs"))
    ratio = np.median(np.divide(seconds["first step, warm"], seconds["first step, cold"]))
    print(f"--help: {np.median(seconds['--help']):.2f} s (target: under 0.5 s)")
    print(f"first step, warm / cold: {ratio:.2f} (target: at most 0.4)")


if __name__ == "__main__":
    main()
