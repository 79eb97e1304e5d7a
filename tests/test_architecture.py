"""Structure of the package: allowed imports, and the maximum length of modules and functions."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `attnlab` itself contains only the version, and `flax_attention_fn`, imported at its first use.
BASE = {"attnlab", "errors", "paths", "signals", "untrusted"}
MODEL = BASE | {"attention", "data", "config", "sharding", "layers", "models", "distributed"}
# Each part of attnlab, with the other parts that it may import.
MAY_IMPORT = {
    "attnlab": {"layers"},  # only when `attnlab.flax_attention_fn` is used
    "errors": set(),
    "signals": set(),
    "paths": {"errors"},
    "untrusted": {"errors", "paths"},
    "provenance": BASE,
    "distributed": {"errors"},
    "attention": {"errors"},
    "data": {"errors", "paths", "untrusted"},
    "config": BASE,
    "sharding": {"errors"},
    "layers": {"errors", "attention", "sharding"},
    "models": {"errors", "attention", "sharding", "layers"},
    "train": MODEL,
    "generation": MODEL,
    "pretrained": MODEL,
    "inspect": MODEL,
    "runner": MODEL | {"provenance", "train", "generation", "pretrained", "inspect"},
    "__main__": {"runner"},
}
# Third-party libraries of the attention package; the kernels of tokamax are optional.
ATTENTION_LIBRARIES = {"jax", "numpy", "jaxtyping"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 450, 70
MAX_FILES_OF_FORWARD_PASS = 16  # of a decoder with the backend blockwise


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted((ROOT / "attnlab").rglob("*.py"))}


def part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imported(module: str) -> set[str]:
    """Return the dotted names of imported modules, with deferred and TYPE_CHECKING imports."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in FILES else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {x.value for x in node.args if isinstance(x, ast.Constant)}
    return names


def test_module_imports_have_no_cycle():
    graph = {module: {name for name in imported(module) if name in FILES} for module in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_follow_allowed_parts():
    assert {part(module) for module in FILES} == set(MAY_IMPORT)
    wrong = [
        f"{module} imports {name}"
        for module in FILES
        for name in sorted(imported(module))
        if name.partition(".")[0] == "attnlab" and part(name) not in MAY_IMPORT[part(module)] | {part(module)}
    ]
    assert wrong == []


def test_allowed_parts_have_no_cycle():
    assert len(list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())) == len(MAY_IMPORT)


def test_package_imports_nothing_outside():
    outside = {"experiments", "benchmarks", "tests", "run"}
    assert [(m, name) for m in FILES for name in imported(m) if name.partition(".")[0] in outside] == []


def test_attention_imports_only_jax_numpy_and_jaxtyping():
    import sys

    for module in FILES:
        if part(module) == "attention":
            libraries = {name.partition(".")[0] for name in imported(module)} - set(sys.stdlib_module_names)
            optional = {"tokamax"} if module.endswith(".tokamax") else set()
            assert libraries <= ATTENTION_LIBRARIES | {"attnlab"} | optional, module


@pytest.mark.parametrize("module", FILES)
def test_modules_and_functions_are_short(module):
    text = FILES[module].read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{module}: {node.name}"


@pytest.mark.parametrize("module", FILES)
def test_global_names_exist(module):
    """ruff and mypy do not check this, since they misread dimension names in annotations."""
    import builtins
    import dis
    import importlib
    import types

    if module.endswith("__main__"):
        pytest.skip("importing it runs the program")
    names = set(dir(builtins)) | set(vars(importlib.import_module(module)))
    pending = [compile(FILES[module].read_text(), module, "exec")]
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        read = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
        assert read <= names, f"{module}.{code.co_name}"


def test_forward_pass_enters_few_files():
    """A reader who follows a model from its config to its logits reads these files."""
    import sys

    import jax
    import jax.numpy as jnp

    from attnlab.attention import exclude_backends
    from attnlab.attention.backends.registry import BACKENDS
    from attnlab.layers import AttentionConfig
    from attnlab.models import DecoderConfig

    model = DecoderConfig(depth=2, width=32, attention=AttentionConfig(heads=4)).build(vocab_size=32)
    tokens = jnp.zeros((2, 16), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    files = set()

    def enter(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "attnlab")):
            files.add(Path(frame.f_code.co_filename).relative_to(ROOT))

    with exclude_backends(*{backend.name for backend in BACKENDS} - {"blockwise"}):
        sys.setprofile(enter)
        try:
            model.apply(params, tokens)
        finally:
            sys.setprofile(None)
    assert Path("attnlab/attention/backends/blockwise.py") in files
    assert len(files) <= MAX_FILES_OF_FORWARD_PASS, sorted(map(str, files))
