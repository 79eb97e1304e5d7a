"""Random command lines: odd values of flags and fields, in every mode."""

import os
from random import Random

from tests.faults import fields
from tests.faults.harness import Harness
from tests.faults.mutate import ODD_NUMBERS, ODD_TEXTS
from tests.faults.process import Result
from tests.programs import write_text

MODES = ("describe", "describe", "describe", "train", "eval", "sample", "export", "import")
CONSTRUCTORS = (
    *("Sliding(64)*3,Causal", "Causal*100000", "Causal*9999", "(Causal(),)", "Sliding", "Sliding(x)", "Lion"),
    *("AdamW(learning_rate=nan)", "Cosine(warmup=1e9)", "GatedMLP(width=-1)", "GatedMLP(GatedMLP)", "Adam"),
    *(
        "MLP(" * 2000 + ")" * 2000,
        "AdamW(b1=2)",
        "Rule('(')",
        "Rotary(theta=0)",
        "Rotary(theta=inf)",
        "MoE(1)",
    ),
)
NAMES = (
    *(
        "text:",
        "text:/dev/zero",
        "text:/dev/stdin",
        "text:/proc/kmsg",
        "text:/etc/..",
        "text:**",
        "text:\udcff",
    ),
    *("text:words.txt", "text:fifo", "text:[", "text:~nobody/x", "text:/etc/passwd", "tfds:", "tfds:a/b/c/d"),
    *("tfds:#x", "tfds:'", "tfds:..", "tfds:gs://x", "tfds:huggingface:x/y", "tfds:\u0663", "tfds:?n?code"),
    *("tfds:x:9.9.9", "stdlib_docs#x", "tfds:__import__('os').system('touch hacked')", "tfds:a;b", "5", ""),
)


def case(rng: Random, harness: Harness, number: int) -> Result:
    """Run a command line with one to three odd values."""
    folder = harness.folder()
    write_text(folder / "words.txt", lines=50)
    (folder / "tiny.py").write_text((harness.trained / "tiny.py").read_text())
    (folder / "binary.flags").write_bytes(rng.randbytes(300))
    os.mkfifo(folder / "fifo")
    (folder / "again.flags").write_text("--flagfile=again.flags\n--mode=describe\n--config=tiny.py\n")
    arguments = _arguments(rng, harness)
    outcome = harness.run(folder, arguments)
    silent = "code ran" if (folder / "hacked").exists() else ""
    return outcome.result(" ".join(word[:120] for word in arguments), silent)


def _arguments(rng: Random, harness: Harness) -> list[str]:
    from attnlab.runner.request import FLAG_MODES

    mode = rng.choice(MODES)
    arguments = [f"--mode={mode}"]
    if mode in ("eval", "sample", "export"):
        arguments.append(f"--workdir={harness.trained / 'run'}")
    else:
        arguments.append("--config=tiny.py")
    if mode in ("train", "import"):
        arguments += ["--workdir=new", "--max_steps=1"] if mode == "train" else ["--workdir=new"]
    if mode == "import":
        arguments.append(f"--checkpoint={harness.checkpoint}")
    flags = [name for name, modes in FLAG_MODES.items() if mode in modes and name not in ("mode", "tracker")]
    for _ in range(rng.choice((1, 1, 2, 3))):
        # A changed field could be a valid request for hours of training, so it is only described.
        if mode == "describe" and rng.random() < 0.8:
            arguments.append(_override(rng, harness))
        elif rng.random() < 0.1:
            arguments.append(f"--flagfile={rng.choice(('binary.flags', 'again.flags', 'none', '.'))}")
        else:
            name = rng.choice(flags)
            arguments.append(f"--{name}={_flag_value(rng, name)}")
    return arguments


def _flag_value(rng: Random, name: str) -> str:
    if name in ("num_samples", "max_new_tokens", "num_beams", "max_steps"):  # large values are valid
        return rng.choice((*ODD_TEXTS, "0", "-1", "2", "1.5", "9" * 5000))
    if name in ("workdir", "output_dir", "init_from", "draft_model", "dump_hlo"):
        inside = [text for text in ODD_TEXTS if text not in ("/", "../..")]  # nothing else is written to
        return rng.choice(
            (*inside, "x/" * 3000, "x" * 300, "words.txt", "words.txt/x", "/proc/x", "\udcff/x")
        )
    if name == "mesh":
        return rng.choice(
            (*ODD_TEXTS, "data:0", "data:" + "9" * 5000, "data:2,data:2", "fsdp:-1", "data:\u0662")
        )
    if name == "profile":
        return rng.choice((*ODD_TEXTS, "9" * 5000 + ":" + "9" * 5001, "1:2:3", "\u0661:\u0662"))
    if name == "sweep":
        return rng.choice(
            (*ODD_TEXTS, "config.model.depth=1,1", "config.model=x", "config.seed=" + "9" * 5000)
        )
    return rng.choice((*ODD_TEXTS, *map(str, ODD_NUMBERS), "9" * 5000, "1:2", "best", "a->b", "(->x", "->"))


def _override(rng: Random, harness: Harness) -> str:
    from attnlab import config

    experiment = config.load(str(harness.trained / "tiny.py")).config
    if rng.random() < 0.5:
        return f"--config.{fields.override(rng, experiment)}"
    paths = list(config.flatten(experiment))
    if rng.random() < 0.25:
        return f"--config.data.name={rng.choice(NAMES)}"
    path = rng.choice(paths)
    if rng.random() < 0.1:
        path += rng.choice((".x", ".", ".0", "." * 3000, ".a" * 3000, "\u0663", ".\udcff"))
    value = rng.choice(
        (rng.choice(ODD_TEXTS), str(rng.choice(ODD_NUMBERS)), rng.choice(CONSTRUCTORS), "9" * 5000, "1e9")
    )
    return f"--config.{path}={value}"
