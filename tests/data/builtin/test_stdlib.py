import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from attnlab.data import Text, prepare
from attnlab.data.baselines import compressed_bits_per_byte
from attnlab.data.builtin import stdlib
from attnlab.errors import InputError

PREPARE = """
import itertools
from attnlab.data.builtin import stdlib
all_modules = stdlib.modules
stdlib.modules = lambda: itertools.islice(all_modules(), 60)
print("start", flush=True)
print(len(stdlib.records("stdlib_docs", "train")))
"""


def start(data_dir, program=PREPARE):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ATTNLAB_DATA_DIR": str(data_dir)},
    )


def test_concurrent_preparation_prints_nothing(tmp_path):
    running = [start(tmp_path), start(tmp_path)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == ""
    assert len(outputs[0][0].splitlines()) == 2
    inside = {path.name for path in (tmp_path / f"format-{prepare.FORMAT}").iterdir()}
    assert inside == {"stdlib_docs", prepare.LOCK}


def test_killed_preparation_leaves_no_partial_data(tmp_path):
    # Slow down, so that the process is certain to be killed while it writes documents.
    slow = "import time; stdlib.split_of = lambda module: time.sleep(0.2) or 'train'; print"
    process = start(tmp_path, PREPARE.replace("print", slow, 1))
    process.stdout.readline()
    while not list(tmp_path.glob("format-*/.preparing-*/*/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    after = start(tmp_path)
    output, errors = after.communicate()
    assert after.returncode == 0, errors
    assert int(output.split()[-1]) > 10
    assert not list(tmp_path.glob("format-*/.preparing-*"))


def test_small_library_has_both_splits(small_library):
    docs, code = Text(name="stdlib_docs"), Text(name="stdlib_code")
    for data in (docs, code):
        train, validation = data.records("train"), data.records("validation")
        assert len(train) > 10 and len(validation) >= 1
        assert all(record["text"].strip() for record in [*train, *validation])
    assert "def __init__" in code.records("train")[0]["text"] + code.records("train")[1]["text"]
    baseline = compressed_bits_per_byte(docs)
    assert set(baseline) == {"bz2", "xz"}
    assert all(1 < bits < 8 for bits in baseline.values())


def test_packages_are_in_one_split():
    modules = [name for name, _ in stdlib.modules()]
    sides = {}
    for name in modules:
        assert sides.setdefault(name.split(".")[0], stdlib.split_of(name)) == stdlib.split_of(name)
    assert stdlib.split_of("_pydecimal") == stdlib.split_of("decimal")
    assert stdlib.split_of("_py_abc") == stdlib.split_of("abc")
    assert sum(side == "validation" for side in sides.values()) >= 15
    assert "json.decoder" in modules and "json" in modules
    assert not any({"test", "tests", "idle_test"} & set(name.split(".")) for name in modules)
    assert len(modules) == len(set(modules))


def test_module_docs_text():
    code = textwrap.dedent('''
        """A module.

            Indented.
        Not indented.
        """
        class Cat(Animal, loud=True):
            """A cat."""
            def say(self, what="meow", *, times: int = 1):
                """Say it."""
            def silent(self): ...
            class Tail:
                def wag(self):
                    """Wag it."""
        async def feed(cat, /):
            """Feed a cat.

            With fish.
            """
    ''')
    assert stdlib.module_docs("pets", code) == textwrap.dedent("""\
        pets

        A module.

            Indented.
        Not indented.

        class pets.Cat(Animal)

        A cat.

        pets.Cat.say(self, what='meow', *, times: int=1)

        Say it.

        pets.Cat.Tail.wag(self)

        Wag it.

        pets.feed(cat, /)

        Feed a cat.

        With fish.""")


def test_version_is_python_version():
    assert str(stdlib.StdlibDocs.VERSION) == "{}.{}.{}".format(*sys.version_info)


def test_unwritable_data_dir_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNLAB_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match="ATTNLAB_DATA_DIR"):
        stdlib.records("stdlib_docs", "train")


@pytest.mark.slow
def test_full_documentation_sizes(data_dir):
    data = Text()
    size = {s: sum(len(r["text"].encode()) for r in data.records(s)) for s in ("train", "validation")}
    assert 0.05 < size["validation"] / sum(size.values()) < 0.11
    assert size["validation"] > 100_000
    tokenizer = data.build_tokenizer()
    batches = list(data.eval_batches("validation", tokenizer))
    assert sum(b.num_bytes.sum() for b in batches) == size["validation"]
    iterator = data.train_iterator(tokenizer, seed=0)
    padding = [1 - (next(iterator).segments > 0).mean() for _ in range(50)]
    assert sum(padding) / len(padding) < 0.01
