"""Two text sets that Python itself carries: the standard library's documentation and its code."""

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
# Some orders of hashing give validation to three giants (tkinter, idlelib, distutils). Under this one it
# is 25 to 30 packages and topics, none above an eighth of the bytes, with no docstring of the training split.
SALT = 11184
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def records(name: str, split: str) -> TextColumn:
    """Records of "stdlib_docs" or "stdlib_code", prepared on first use."""
    builder = prepared({"stdlib_docs": StdlibDocs, "stdlib_code": StdlibCode}[name])
    return TextColumn(builder.as_data_source(split=split), "text")


class _Stdlib(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    # Another Python has another library: its text is another version of the set.
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
    """English: a document per module, its docstrings under their signatures, and one per help topic."""

    DESCRIPTION = "Docstrings and help topics of the Python standard library."

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """Pairs of module (or topic:NAME) and text."""
        for module, path in modules():
            if split_of(module) == split and (text := module_docs(module, source(path))):
                yield module, text
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            if split_of(f"topic:{topic}") == split:
                yield f"topic:{topic}", inspect.cleandoc(text)


class StdlibCode(_Stdlib):
    """Python: a document per module, its source."""

    DESCRIPTION = "Source code of the Python standard library."

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """Pairs of module and source."""
        for module, path in modules():
            if split_of(module) == split and (text := source(path)).strip():
                yield module, text


def modules() -> Iterator[tuple[str, Path]]:
    """Name and file of every module of the standard library, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        generated = "-" in "".join(parts) or (parts[0] == "encodings" and b"_table" in path.read_bytes())
        if not generated and LEFT_OUT.isdisjoint(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def source(path: Path) -> str:
    """The text of a Python file in its declared encoding."""
    with tokenize.open(path) as file:
        return file.read()


def split_of(module: str) -> str:
    """The split of a module or topic: by a hash of its top-level name, so that a package stays together."""
    # _pydecimal repeats the docstrings of decimal word for word: it goes where that goes.
    top = re.sub(r"^_+(py_?)?", "", module.split(".")[0])
    digest = hashlib.sha256(f"{SALT}:{top}".encode()).digest()
    return "validation" if int.from_bytes(digest[:4]) % 100 < VALIDATION_PERCENT else "train"


def module_docs(module: str, code: str) -> str:
    """Every docstring of a module under its name and signature, in order of appearance."""
    parts = [
        f"{title}\n\n{doc}" for title, node in _definitions(module, ast.parse(code)) if (doc := _doc(node))
    ]
    return "\n\n".join(parts)


def _doc(node: Definition) -> str:
    # Characters that no encoding can write stand in a docstring here and there.
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
