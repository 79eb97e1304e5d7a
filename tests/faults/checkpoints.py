"""Flipped bits in every file of a checkpoint, and damage of whole files of a run."""

import shutil
from pathlib import Path
from random import Random

from tests.faults.harness import STEPS_AGAIN, Harness, digests_in
from tests.faults.mutate import flip, odd_bytes, odd_json, replace_file
from tests.faults.process import Outcome, Result

DESCRIBE = ["--mode=describe", "--workdir=run"]
ODD_NAMES = (
    "\u00b2",
    "\u0663",
    "-1",
    "5",
    "4.orbax-checkpoint-tmp",
    "x",
    "0x4",
    "4 ",
    "9" * 200,
    ".4",
    "damaged",
)


def bits(rng: Random, harness: Harness, number: int) -> Result:
    """Flip one bit of a random byte of the latest checkpoint, then describe or resume the run."""
    folder = _copy(harness)
    files = [file for file in sorted((folder / "run" / "checkpoints" / "4").rglob("*")) if file.is_file()]
    # Half by file, so that small files are hit as well; half by byte, as hardware does.
    weights = [file.stat().st_size for file in files] if rng.random() < 0.5 else None
    (file,) = rng.choices([file for file in files if file.stat().st_size], weights=_positive(weights))
    data = file.read_bytes()
    byte, bit = rng.randrange(len(data)), rng.randrange(8)
    file.write_bytes(flip(data, byte, bit))
    return _result(rng, harness, folder, f"bit {bit} of byte {byte} of {file.relative_to(folder)}")


def _positive(weights: list[int] | None) -> list[int] | None:
    return weights and [weight for weight in weights if weight]


def files(rng: Random, harness: Harness, number: int) -> Result:
    """Damage a whole file of a run, or put an odd folder beside its checkpoints."""
    folder = _copy(harness)
    run = folder / "run"
    action = rng.random()
    if action < 0.1:
        name = rng.choice(ODD_NAMES)
        (run / rng.choice(("checkpoints", "damaged")) / name).mkdir(parents=True, exist_ok=True)
        tried = f"a folder {name!r}"
    elif action < 0.15:
        (run / "damaged").write_text("")
        _damage(rng, run / "checkpoints" / "4")
        tried = "a file named damaged"
    else:
        places = [run / "checkpoints" / "4"] * 3 + [run / "checkpoints", run]
        tried = _damage(rng, rng.choice(places))
    return _result(rng, harness, folder, tried)


def _damage(rng: Random, place: Path) -> str:
    """Damage a random file below `place`, other than the config."""
    files = [file for file in sorted(place.rglob("*")) if file.is_file() and file.name not in KEPT]
    file = rng.choice(files)
    data, action = file.read_bytes(), rng.random()
    if action < 0.2:
        return f"{replace_file(rng, file)} for {file}"
    if action < 0.3 and not file.parent.samefile(place):
        shutil.rmtree(file.parent)
        return f"no folder {file.parent}"
    try:
        import json

        text = odd_json(rng, json.loads(data)) if action < 0.7 else ""
    except ValueError:
        text = ""
    file.write_bytes(text.encode(errors="surrogatepass") or odd_bytes(rng, data))
    return f"{'JSON' if text else 'bytes'} of {file}"


KEPT = ("config.json", "experiment.py", "tokenizer.json")  # see `configs.saved`


def _copy(harness: Harness) -> Path:
    folder = harness.folder()
    shutil.copytree(harness.trained / "run", folder / "run")
    return folder


def _result(rng: Random, harness: Harness, folder: Path, tried: str) -> Result:
    resume = ["--workdir=run", f"--config.train.steps={STEPS_AGAIN}"]
    position = "/data/" in tried or "process_" in tried
    resumes = rng.random() < (0.8 if position else 0.25)
    commands = [resume, DESCRIBE] if resumes else [DESCRIBE]
    outcome = harness.run(folder, *commands)
    if resumes and outcome.code == 0 and not outcome.limit:
        return outcome.result(f"resume: {tried}", _difference(harness, outcome, STEPS_AGAIN))
    return outcome.result(tried.replace(str(folder), ""), _difference(harness, outcome))


def _difference(harness: Harness, outcome: Outcome, step: int | None = None) -> str:
    """Return how the described parameters differ from those of an undisturbed run at that step."""
    found = digests_in(outcome.out)
    if outcome.code or outcome.limit:
        return ""
    if not found:
        return "" if step is None else "no parameters are described"
    for reached, digest in found:
        if step not in (None, reached):
            return f"step {reached} instead of {step}"
        if harness.digests.get(reached) != digest:
            return f"other parameters at step {reached}"
    return ""
