"""Saved configs with changed fields, and experiment files that fail in odd ways."""

import json
import os
import shutil
from random import Random
from typing import Any

from tests.faults.harness import Harness
from tests.faults.mutate import odd_bytes, odd_json, replace_file
from tests.faults.process import Result

TAGS = (
    *(
        "os:system",
        "builtins:eval",
        "attnlab.models:Decoder",
        "experiment:get_config",
        "experiment.x:Y",
        "a:b",
    ),
    *(
        ":",
        "x:",
        "attnlab.train.experiment:Experiment",
        "subprocess:Popen",
        "attnlab:x.y.z",
        "5",
        "." * 300 + ":x",
    ),
    *("attnlab.data.tokenizer:Bytes", "pathlib:Path", "enum:Enum", "builtins:int", "typing:Any", "\udcff:x"),
)
ODD_OBJECTS = (
    *({"$float": x} for x in ("x", "nan", [1], None, {}, "9" * 5000, 10**400, True)),
    *({"$enum": x, "name": "A"} for x in ("x", [1], None, "enum:Enum", "signal:Signals")),
    *({"$enum": "signal:Signals", "name": x} for x in (["SIGTERM"], {}, None, 5)),
    *({"$type": x} for x in (*TAGS, None, 5, [], {})),
)


def saved(rng: Random, harness: Harness, number: int) -> Result:
    """Describe, evaluate or resume a run whose config or experiment file was changed."""
    folder = harness.folder()
    run, original = folder / "run", harness.trained / "run"
    shutil.copytree(original, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "checkpoints").symlink_to(original / "checkpoints")
    file = run / rng.choice(("config.json",) * 9 + ("tokenizer.json", "experiment.py", "versions.json"))
    action = rng.random()
    if action < 0.05 or not file.exists():
        tried = f"{replace_file(rng, file)} for {file.name}"
    elif action < 0.15 or file.suffix != ".json":
        file.write_bytes(odd_bytes(rng, file.read_bytes()))
        tried = f"bytes of {file.name}"
    else:
        record = json.loads(file.read_text())
        text = odd_json(rng, _with_object(rng, record) if rng.random() < 0.3 else record)
        file.write_text(text, errors="surrogatepass")
        tried = f"JSON of {file.name}"
    mode = rng.choice(("describe", "describe", "eval", "sample"))
    return harness.run(folder, [f"--mode={mode}", "--workdir=run"]).result(f"{mode}: {tried}")


def _with_object(rng: Random, record: Any) -> Any:
    """Return a JSON value; if it is a saved config, a random field of it is an odd object."""
    node = record.get("config") if isinstance(record, dict) else None
    while isinstance(node, dict) and node:
        name = rng.choice(list(node))
        if not isinstance(node[name], dict) or rng.random() < 0.3:
            node[name] = rng.choice(ODD_OBJECTS)
            break
        node = node[name]
    return record


RAISED = (
    *(
        "BaseException('x')",
        "GeneratorExit",
        "KeyboardInterrupt",
        "SystemExit(0)",
        "SystemExit('x')",
        "Silent()",
    ),
    *(
        "MemoryError",
        "RecursionError",
        "StopIteration",
        "StopAsyncIteration",
        "Exception('a\\nb')",
        "OSError",
    ),
    *("Exception('\\udcff')", "UnicodeError", "Exception('x' * 10**6)", "ExceptionGroup('x', [Silent()])"),
    *(
        "FloatingPointError('x')",
        "BrokenPipeError",
        "Warning",
        "SyntaxError",
        "SyntaxError('x', ('a', -1, 2, 'b'))",
    ),
)
STATEMENTS = (
    *(
        "import sys; sys.stdout.close()",
        "import sys; sys.stdout = None",
        "import os; os.close(1)",
        "print('\\udcff')",
    ),
    *(
        "def f(): f()\nf()",
        "import tiny_nothing",
        "from . import x",
        "import self_",
        "1 / 0",
        "x = '\\0'",
        "\0",
    ),
    *("import threading; threading.Thread(target=lambda: 1 / 0).start()", "get_config = 5", "del get_config"),
    *(
        "get_config = lambda: 5",
        "get_config = lambda *a, **k: E",
        "def get_config(x, y): pass",
        "get_config = int",
    ),
    *(
        "import os; os.chdir('/')",
        "import os; os.remove(__file__)",
        "import sys; sys.path.clear()",
        "async def get_config(): pass",
    ),
    *(
        "def get_config(): yield 5",
        "get_config = type('C', (), {'__call__': lambda s: s})()",
        "(" * 1000,
        "x = " + "-" * 3000 + "1",
    ),
    *(
        "import sys; sys.setrecursionlimit(50)",
        "__builtins__ = {}",
        "import builtins; del builtins.print",
        "\ufeffx = 1",
    ),
    *("import sys; sys.exit = None", "import warnings; warnings.warn('x')", "import os; os.environ.clear()"),
    *(
        "E = replace(E, model=5)",
        "E = replace(E, data=None)",
        "E = replace(E, train='x')",
        "E = replace(E, seed=2**64)",
    ),
    *(
        "E = replace(E, seed=-1)",
        "E = replace(E, seed=float('nan'))",
        "E = replace(E, seed=True)",
        "E = E, E",
        "E = type(E)",
    ),
    *(
        "object.__setattr__(E, 'seed', Odd())",
        "object.__setattr__(E, 'model', E)",
        "object.__delattr__(E, 'data')",
    ),
)
ODD = """
class Silent(Exception):
    def __str__(self):
        raise ValueError("no text")
class Odd:
    def __repr__(self):
        raise ValueError("no text")
    __eq__ = __hash__ = __str__ = __repr__
"""


def experiment(rng: Random, harness: Harness, number: int) -> Result:
    """Describe or train an experiment file that raises, or does something odd."""
    folder = harness.folder()
    source = (harness.trained / "tiny.py").read_text()
    source = (
        source.replace("return Experiment(", "E = Experiment(").rstrip() + "\n    {inside}\n    return E\n"
    )
    words = f"raise {rng.choice(RAISED)}" if rng.random() < 0.4 else rng.choice(STATEMENTS)
    words = words.replace("\n", "\n    ")
    if rng.random() < 0.6:
        text = "from dataclasses import replace\n" + ODD + source.replace("{inside}", words)
    else:
        text = source.replace("{inside}", "pass") + ODD + "\n" + words.replace("\n    ", "\n") + "\n"
    file = folder / "odd.py"
    file.write_bytes(text.encode(errors="surrogatepass"))
    if rng.random() < 0.1:
        words = rng.choice(("bytes", replace_file(rng, file) if rng.random() < 0.5 else "bytes"))
        if words == "bytes" and file.is_file():
            file.write_bytes(odd_bytes(rng, text.encode(errors="replace")))
    if rng.random() < 0.03:
        file.unlink(missing_ok=True) if not file.is_dir() else None
        os.mkfifo(folder / "fifo.py")
        file = folder / "fifo.py"
    mode = rng.choice((["--mode=describe"], ["--workdir=new", "--max_steps=1"]))
    outcome = harness.run(folder, [*mode, f"--config={file.name}"])
    return outcome.result(f"{' '.join(mode)}: {words[:80]!r}")
