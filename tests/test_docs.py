"""README, CONTRIBUTING and docs/: every command runs, and every name on a page exists.

Each page is executed from top to bottom in a copy of the project, in a subprocess with eight
simulated devices. Commands run with a tiny model and a few steps. Pages with many commands are
slow, so they are also executed with `resolve`, which only validates each command. A comment before
a block changes this:

    <!-- resolve only -->   only validate flags, fields and files: the commands need a network,
                            other devices or too much time
    <!-- preflight -->      executed by the tests marked `preflight`
    <!-- parity -->         executed by the tests marked `parity`: needs torch
    <!-- from FILE -->      quoted from FILE
"""

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attnlab.runner.exit_codes import ExitCode
from tests.compilation import FAST_COMPILATION, default_environment

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = ("resolve only", "preflight", "parity", "from ")
LANGUAGES = ("", "bash", "console", "python", "diff")
# Executed by .ci/run, since a test cannot execute them in its own environment.
INSTALLING_AND_CHECKING = ("pip", "pytest", "ruff", "mypy")
TINY = {
    "model.depth": "2",
    "model.width": "32",
    "model.attention.heads": "4",
    "data.sequence_length": "64",
    "data.batch_size": "32",
    "train.eval_batches": "1",
}
FEW_STEPS, FEW_STEPS_MORE = 12, 32
DEVICES = "--xla_force_host_platform_device_count=8"
MOST_STEPS = 20  # of a command with a --max_steps of its own
# Pages whose commands take over ten seconds in total, and their marks.
LONG = {
    **dict.fromkeys(("README.md", "attention.md", "data.md", "sharding.md", "trust.md"), pytest.mark.slow),
    **dict.fromkeys(
        ("CONTRIBUTING.md", "checkpoints.md", "configuration.md", "getting_started.md"), pytest.mark.long
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: the comment before it, its language, text and line number."""

    note: str
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fence = re.compile(r"(?:<!-- ([^>]*?) -->\n\n?)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [Block(m[1] or "", m[2], m[3], text.count("\n", 0, m.start(3)) + 1) for m in fence.finditer(text)]


def inline_code(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([^`\n]+)`", prose))


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the commands of a block as words, without comments, `$` prompts and `&&`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


# --- Names exist


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_blocks_have_known_languages_and_commands(page):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, where
        assert not block.note or block.note.startswith(NOTES), (
            f"{where}: unknown comment <!-- {block.note} -->"
        )
        if block.language in ("bash", "console"):
            for words in commands(block):
                known = command_line(words) or words[0] in INSTALLING_AND_CHECKING
                assert known, f"{where}: {' '.join(words)} is not executed by any test"
        else:
            assert "python run.py" not in block.text or block.language == "python" or block.note, where


def test_flags_exist(page):
    from attnlab.runner.request import FLAG_MODES

    for code in inline_code(page):
        for flag in re.findall(r"(?:^|\s)'?--([\w.]+)", code if code.startswith(("--", "'--")) else ""):
            assert flag.startswith("config.") or flag in (*FLAG_MODES, "help", "version"), (
                f"{page.name}: --{flag}"
            )


def test_exit_codes_are_documented():
    table = (ROOT / "docs" / "checkpoints.md").read_text().partition("## Exit codes")[2]
    rows = re.findall(r"^\| (\d+) \|", table.partition("\n## ")[0], re.MULTILINE)
    assert [int(row) for row in rows] == [int(code) for code in ExitCode]


def test_fields_exist(page):
    from attnlab.train import Experiment

    known = set(field_paths(Experiment))
    for code in inline_code(page):
        named = re.fullmatch(
            r"(?:--)?(?:config\.)?((?:model|data|optimizer|loss|train)\.[\w.]*\w)(=.*)?", code
        )
        if named and not re.search(r"\.-?\d+(\.|$)", named[1]):
            assert named[1] in known, f"{page.name}: there is no field {named[1]}"


def field_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the path of every field of a config, for every choice of its components."""
    from attnlab.config.types import choices, fields_of

    for name, annotation in fields_of(cls).items():
        yield prefix + name
        for choice in choices(annotation).values():
            yield from field_paths(choice, f"{prefix}{name}.")


def test_files_exist(page):
    tops = {path.name for path in ROOT.iterdir()}
    for code in inline_code(page):
        if re.fullmatch(r"[\w./-]+", code) and "/" in code and code.split("/")[0] in tops - {"runs"}:
            assert (ROOT / code).exists(), f"{page.name}: there is no {code}"


def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {target} is none of {slugs}"


def test_extras_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"\"\.\[([\w,]+)\]\"", page.read_text()):
        assert set(group.split(",")) <= set(extras), f"{page.name}: {group}"


def test_quotations_match_their_files(page):
    for block in blocks(page):
        if block.note.startswith("from "):
            assert block.text in (ROOT / block.note.removeprefix("from ")).read_text(), (
                f"{page.name}:{block.line} differs from {block.note.removeprefix('from ')}"
            )


def test_architecture_tree_exists():
    (tree,) = (b for b in blocks(ROOT / "docs" / "architecture.md") if not b.language)
    folders: dict[int, str] = {}
    for line in tree.text.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        path = ROOT / "".join(folders[d] for d in folders if d < depth) / name
        assert path.exists(), f"architecture.md: there is no {path.relative_to(ROOT)}"
        folders = {d: f for d, f in folders.items() if d < depth} | {depth: name}


def test_table_of_axes_matches_rules():
    from attnlab.sharding import LOGICAL_AXIS_RULES

    def cell(axes) -> str:
        return ", ".join(f"`{a}`" for a in ((axes,) if isinstance(axes, str) else axes)) if axes else "—"

    table = (
        (ROOT / "docs" / "sharding.md").read_text().partition("<!-- rules -->")[2].strip().split("\n\n")[0]
    )
    rows = [tuple(c.strip() for c in row.strip("|").split("|")) for row in table.splitlines()[2:]]
    assert rows == [
        (f"`{name}`", cell(used), cell(stored)) for name, (used, stored) in LOGICAL_AXIS_RULES.items()
    ]


def test_table_of_features_cites_existing_tests():
    """Every supported feature cites existing tests."""
    page = (ROOT / "docs" / "attention_features.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] not in ("feature", "---")]
    assert len(rows) > 40
    for feature, supported, shown, *others in rows:
        names = re.findall(r"`([\w/]+\.py)::(\w+)`", shown)
        assert len(others) == 10, feature
        assert shown == ", ".join(f"`{file}::{name}`" for file, name in names), f"{feature}: {shown}"
        assert re.match(r"(yes|partly|no)\b", supported), f"{feature}: {supported}"
        assert supported.startswith("no") or names, f"{feature} cites no test"
        for file, name in names:
            tests = ROOT / "tests"
            path = tests / file if "/" in file else next((tests / "attention").rglob(file))
            functions = (n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
            assert name in functions, f"{feature}: {file} has no {name}"


def test_table_of_model_types_matches_families():
    from attnlab.pretrained.families import FAMILIES

    page = (ROOT / "docs" / "pretrained.md").read_text()
    table = page.partition("<!-- model types -->")[2].strip().split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(FAMILIES)
    for kind, _, file, _ in rows:
        assert (ROOT / "tests" / "pretrained" / file).exists(), f"{kind}: there is no {file}"


# --- Commands run


@pytest.fixture
def project(page, tmp_path) -> Path:
    """Return a copy of the project with the diffs of the page applied."""
    for name in ("attnlab", "experiments", "run.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for block in blocks(page):
        if block.language == "diff":
            patch = subprocess.run(
                ["git", "apply", "-"], cwd=tmp_path, input=block.text, text=True, capture_output=True
            )
            assert not patch.returncode, f"{page.name}:{block.line} does not apply: {patch.stderr}"
    return tmp_path


def executable_pages(long: bool | None = None) -> list[Any]:
    """Return the pages with commands, filtered by length; by default all, with their marks."""
    return [
        pytest.param(page, id=page.name, marks=LONG.get(page.name, ()) if long is None else ())
        for page in PAGES
        if any(
            b.language in ("bash", "console", "python") and not b.note.startswith("from ")
            for b in blocks(page)
        )
        and long in (None, page.name in LONG)
    ]


@pytest.mark.parametrize("page", executable_pages(long=True), indirect=True)
def test_page_validates(page, project, compiled):
    spawn(["-m", "tests.test_docs", str(page), "resolve"], project, compiled)


@pytest.mark.parametrize("page", executable_pages(), indirect=True)
def test_page_executes(page, project, compiled):
    spawn(["-m", "tests.test_docs", str(page)], project, compiled)


@pytest.mark.parity
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "<!-- parity -->" in p.read_text()], ids=lambda p: p.name, indirect=True
)
def test_page_executes_with_torch(page, project, compiled):
    spawn(["-m", "tests.test_docs", str(page), "parity"], project, compiled)


@pytest.mark.preflight
def test_preflight_blocks_compile_for_tpu(tmp_path, compiled):
    pytest.importorskip("libtpu")
    for page in PAGES:
        for block in blocks(page):
            if block.note == "preflight":
                # libtpu serves only one process by default, but other tests compile in parallel.
                variables = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": DEVICES}
                output = spawn(["-c", block.text], tmp_path, compiled, **variables)
                assert "True" in output


def spawn(arguments: list[str], folder: Path, compiled: Path, **variables: str) -> str:
    environment = default_environment() | {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{DEVICES} {FAST_COMPILATION}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    environment |= variables
    completed = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def execute(page: Path, resolve_only: bool = False, parity: bool = False) -> None:
    """Execute a page in the current folder; with `parity`, also its blocks for torch."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.note == "preflight" or block.note.startswith("from "):
            continue
        if block.note == "parity" and not parity:
            continue
        if block.language == "python":
            print(f"# {where}", flush=True)
            if file := re.match(r"# ([\w/]+\.py)\n", block.text):
                Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(file[1]).write_text(block.text)
            elif not resolve_only and block.note != "resolve only":
                exec(compile(block.text, where, "exec"), names)
        elif block.language == "console":
            answers = [line for line in block.text.splitlines() if not line.startswith("$ ")]
            for words, answer in zip(commands(block), answers, strict=True):
                assert_rejected(words, answer)
        elif block.language == "bash":
            for words in commands(block):
                if words[0] == "pytest" and not resolve_only and len(words) > 1 and Path(words[1]).is_file():
                    subprocess.run([sys.executable, "-m", "pytest", "-q", words[1]], check=True)
                elif argv := command_line(words):
                    run_command(argv, resolve_only or block.note == "resolve only", save_config=resolve_only)
    if not resolve_only and "<!-- workdir -->" in page.read_text():
        table = page.read_text().partition("<!-- workdir -->")[2].strip().split("\n\n")[0]
        for name in re.findall(r"^\| `([\w./]+)`", table, flags=re.MULTILINE):
            assert (Path("runs/first") / name).exists(), f"the workdir has no {name}"


def run_command(words: list[str], resolve_only: bool, save_config: bool) -> None:
    """Run a command with a tiny model, or only validate it.

    `save_config` saves the config of each run that the command would train.
    """
    from attnlab import config

    print("$ " + shlex.join(words), flush=True)
    requests: list[Any] = []
    stub = types.ModuleType("attnlab.runner.modes")
    stub.run = lambda request: requests.append(request) or {}  # type: ignore[attr-defined]
    code = call(words, stub)
    assert code == 0, f"exit code {code}"
    for request in requests if save_config else ():
        if request.mode == "train":
            config.save(request.workdir, request.loaded, request.config, request.sources)
    if not resolve_only and requests:
        limited = [re.sub(r"^--max_steps=(\d+)$", _at_most_steps, word) for word in words]
        code = call([*limited, *tiny_flags(words, requests[0])])
        # A model trained for a few steps fails the claims of its experiment.
        assert code in (ExitCode.DONE, ExitCode.CLAIM_FAILED), f"exit code {code}"


def _at_most_steps(flag: re.Match[str]) -> str:
    return f"--max_steps={min(int(flag[1]), MOST_STEPS)}"


def tiny_flags(words: list[str], request: Any) -> list[str]:
    """Return flags that make a command fast; the run of an existing workdir is already tiny."""
    from attnlab.data import Bytes, Text

    tiny = dict(TINY)
    if isinstance(request.config.data, Text):
        tiny["data.tokenizer"] = Bytes.__name__
    if request.config.init is not None:  # the model is that of the checkpoint, already tiny
        tiny = {path: text for path, text in tiny.items() if not path.startswith("model.")}
    if request.mode in ("eval", "sample", "export") or (request.mode == "describe" and request.workdir):
        tiny = {}
    swept = [re.match(r"--sweep=(?:config\.)?([^=]*)", word) for word in words]
    flags = [f"--config.{p}={text}" for p, text in tiny.items() if p not in [m[1] for m in swept if m]]
    if request.mode == "train" and not request.fast_dev_run and request.max_steps is None:
        resumed = (request.workdir / "checkpoints").exists()
        flags.append(f"--max_steps={FEW_STEPS_MORE if resumed else FEW_STEPS}")
    if request.mode == "sample":
        flags.append("--max_new_tokens=4")
    return flags


def call(words: list[str], runner: types.ModuleType | None = None) -> int:
    """Return the exit code of run.py, optionally with a fake runner module."""
    from absl import flags

    from attnlab.runner import cli
    from attnlab.runner.request import FLAG_MODES

    real = sys.modules.pop("attnlab.runner.modes", None)
    if runner is not None or real is not None:
        sys.modules["attnlab.runner.modes"] = runner or real
    try:
        return cli.main(words)
    finally:
        for name in FLAG_MODES:
            flags.FLAGS[name].unparse()  # back to its default
        if runner is not None:
            del sys.modules["attnlab.runner.modes"]
            if real is not None:
                sys.modules["attnlab.runner.modes"] = real


def command_line(words: list[str]) -> list[str]:
    """Return the program name and arguments of an attnlab command; empty for other commands."""
    return words if words[0] == "attnlab" else words[1:] if words[:2] == ["python", "run.py"] else []


def assert_rejected(words: list[str], answer: str) -> None:
    """Assert that a command fails with the message printed under it; `...` matches any text."""
    print("$ " + shlex.join(words), flush=True)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = call(command_line(words))
    pattern = re.escape(answer).replace(re.escape("..."), ".*")
    assert code == 2 and re.fullmatch(pattern, stderr.getvalue().strip()), (code, stderr.getvalue())


if __name__ == "__main__":
    execute(Path(sys.argv[1]), resolve_only="resolve" in sys.argv[2:], parity="parity" in sys.argv[2:])
