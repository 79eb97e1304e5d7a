"""Two text sets of the running Python: documentation and code of the standard library."""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from attnlab.data.prepare import prepared
from attnlab.data.tfds_text import TextColumn

VALIDATION_PERCENT = 8
# With some salts validation consists of three large packages (tkinter, idlelib, distutils). With
# this one it has 25 to 30 packages and topics, none above an eighth of the bytes, and no docstring
# of the training split.
SALT = 11184
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def records(name: str, split: str) -> TextColumn:
    """Return the records of "stdlib_docs" or "stdlib_code", prepared on first use."""
    builder = prepared({"stdlib_docs": StdlibDocs, "stdlib_code": StdlibCode}[name])
    return TextColumn(builder.as_data_source(split=split), "text")


class _Stdlib(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    # Another Python version has another standard library, which is another version of the set.
    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info))
    DESCRIPTION = ""

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"module": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=self.DESCRIPTION, license="PSF-2.0"
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str):
        for module, text in self.documents(split):
            yield module, {"module": module, "text": text}


class StdlibDocs(_Stdlib):
    """English: one document per module (docstrings with signatures) and one per help topic."""

    DESCRIPTION = "Docstrings and help topics of the Python standard library."

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield pairs of module (or topic:NAME) and text."""
        for module, path in modules():
            if split_of(module) == split and (text := module_docs(module, source(path))):
                yield module, text
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            if split_of(f"topic:{topic}") == split:
                yield f"topic:{topic}", inspect.cleandoc(text)


class StdlibCode(_Stdlib):
    """Python: one document per module, its source."""

    DESCRIPTION = "Source code of the Python standard library."

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield pairs of module and source."""
        for module, path in modules():
            if split_of(module) == split and (text := source(path)).strip():
                yield module, text


def modules() -> Iterator[tuple[str, Path]]:
    """Yield name and file of every standard module, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        generated = "-" in "".join(parts) or (parts[0] == "encodings" and b"_table" in path.read_bytes())
        if not generated and LEFT_OUT.isdisjoint(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def source(path: Path) -> str:
    """Return the text of a Python file in its declared encoding."""
    with tokenize.open(path) as file:
        return file.read()


def split_of(module: str) -> str:
    """Return the split of a module or topic by a hash of its top-level name.

    A package is therefore in one split.
    """
    # _pydecimal repeats the docstrings of decimal, so both must be in the same split.
    top = re.sub(r"^_+(py_?)?", "", module.split(".")[0])
    digest = hashlib.sha256(f"{SALT}:{top}".encode()).digest()
    return "validation" if int.from_bytes(digest[:4]) % 100 < VALIDATION_PERCENT else "train"


def module_docs(module: str, code: str) -> str:
    """Return every docstring of a module under its name and signature, in order of appearance."""
    parts = [
        f"{title}\n\n{doc}" for title, node in _definitions(module, ast.parse(code)) if (doc := _doc(node))
    ]
    return "\n\n".join(parts)


def _doc(node: Definition) -> str:
    # Some docstrings contain characters that no encoding can write.
    return (ast.get_docstring(node) or "").encode("utf-8", errors="replace").decode().strip()


def _definitions(title: str, node: Definition) -> Iterator[tuple[str, Definition]]:
    yield title, node
    name = title.split("(")[0].removeprefix("class ")
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            yield from _definitions(f"class {name}.{child.name}" + (f"({bases})" if bases else ""), child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(f"{name}.{child.name}({ast.unparse(child.args)})", child)
