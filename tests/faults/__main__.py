"""Try random faults for some minutes and print a table; see the package's docstring."""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.faults import checkpoints, command_lines, configs, imports, kills, media, tokenizers
from tests.faults.harness import Harness, make_environment
from tests.faults.process import Result

KINDS: dict[str, Callable[[Random, Harness, int], Result]] = {
    "command_lines": command_lines.case,
    "saved_configs": configs.saved,
    "experiment_files": configs.experiment,
    "checkpoint_bits": checkpoints.bits,
    "checkpoint_files": checkpoints.files,
    "imports": imports.case,
    "tokenizers": tokenizers.case,
    "images": media.image,
    "sounds": media.sound,
    "preprocessors": media.preprocessor,
    "kills": kills.single,
    "kills_of_8_devices": kills.eight_devices,
}
CASES_PER_SEED = 10_000
MINUTES_OF_ALL_KILLS = 6  # with less time, a run is killed only FEW_KILLS times, on one device
FEW_KILLS, ALL_KILLS = 3, 20
# An unexpected exception that the command line reports in one line and a file is not unclean, but
# each is listed, because a message would serve the user better.
CLEAN = ("clean", "reported")
UNCLEAN = ("silent", "traceback", "not one line", "hang", "memory")


def main(argv: list[str] | None = None) -> int:
    """Run the cases and return the exit code: 1 if any is unclean."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="the time for all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="selects the cases")
    parser.add_argument("--only", help=f"kinds, or KIND:CASE to repeat a case: {', '.join(KINDS)}")
    parser.add_argument(
        "--kills", type=int, help="how often a run is killed, instead of 20 or, in a short time, 3"
    )
    options = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="attnlab-faults-"))
    os.environ.update(make_environment(root))
    tempfile.tempdir = str(root)  # also of the forked processes
    for name in ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "ATTNLAB_DEBUG"):
        os.environ.pop(name, None)
    try:
        return _run(options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(options: argparse.Namespace, root: Path) -> int:
    # The forked processes need not import these again. None of them initializes JAX's devices.
    import attnlab.data.media
    import attnlab.data.tfds_text
    import attnlab.runner.cli
    import attnlab.runner.modes
    import attnlab.runner.reports  # noqa: F401

    only, _, chosen = (options.only or "").partition(":")
    names = only.split(",") if only else list(KINDS)
    if unknown := sorted({*names} - {*KINDS}):
        print(f"error: no kind {unknown[0]!r}; kinds: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    many = options.minutes >= MINUTES_OF_ALL_KILLS or only
    harness = Harness(root, options.kills or (ALL_KILLS if many else FEW_KILLS))
    names = [name for name in names if many or name != "kills_of_8_devices"]
    if chosen:
        result = _try(harness, only, int(chosen))
        print("\n".join(result))
        return int(result.verdict not in CLEAN)
    return _rounds(options, harness, names)


def _rounds(options: argparse.Namespace, harness: Harness, names: list[str]) -> int:
    """Run cases until the time is over: always the kind with the least time so far."""
    end = time.monotonic() + 60 * options.minutes
    spent = dict.fromkeys(names, 0.0)
    tried: dict[str, list[Result]] = {name: [] for name in names}
    with contextlib.suppress(KeyboardInterrupt):  # the table shows the cases so far
        _fill(options, harness, tried, spent, end)
    print(table(tried, spent))
    return int(any(result.verdict not in CLEAN for results in tried.values() for result in results))


def _fill(
    options: argparse.Namespace,
    harness: Harness,
    tried: dict[str, list[Result]],
    spent: dict[str, float],
    end: float,
) -> None:
    while (start := time.monotonic()) < end:
        name = min(tried, key=lambda name: (len(tried[name]) > 0, spent[name]))
        number = options.seed * CASES_PER_SEED + len(tried[name])
        result = _try(harness, name, number)
        tried[name].append(result)
        spent[name] += time.monotonic() - start
        if result.verdict != "clean":
            print(
                f"{result.verdict}: --only={name}:{number}\n  {result.tried}\n  {result.detail}", flush=True
            )


def _try(harness: Harness, name: str, number: int) -> Result:
    """Run one case, and remove its folder."""
    kept = set(harness.root.iterdir())
    try:
        return KINDS[name](Random(f"{name}:{number}"), harness, number)
    finally:
        for folder in set(harness.root.glob("case-*")) | set(harness.root.glob("kills-*")):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def table(tried: dict[str, list[Result]], spent: dict[str, float]) -> str:
    """Return the numbers of cases as a table: tried, clean, and each unclean verdict."""
    rows = [["kind", "tried", *CLEAN, *UNCLEAN, "seconds"]]
    total: Counter[str] = Counter()
    for name, results in tried.items():
        counts = Counter(result.verdict for result in results)
        total += counts
        rows.append([name, *_cells(counts), f"{spent[name]:.0f}"])
    rows.append(["in all", *_cells(total), f"{sum(spent.values()):.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _cells(counts: Counter[str]) -> list[str]:
    return [str(counts.total()), *(str(counts[verdict]) for verdict in (*CLEAN, *UNCLEAN))]


if __name__ == "__main__":
    sys.exit(main())
