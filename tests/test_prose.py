"""Plain technical English: no phrase of a private dialect, and no prose line over 100 columns.

Checks Markdown pages, docstrings, comments, user-visible strings and test names. To list the
offences of some files or folders: `python -m tests.test_prose attnlab/layers README.md`.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("attnlab", "experiments", "benchmarks", "tests", "docs", "launch")
COLUMNS = 100

# Each phrase has a standard word that readers search for: see CONTRIBUTING.md, "English".
BANNED = re.compile(
    r"""
      \b (is|are|was|were|be|been|being) \s+ (told|said) \b
    | \b (tells?|told) \s+ (of|apart) \b
    | \b misspelt \b
    | \b as \s+ of \b
    | \b of \s+ which \b
    | \b so \s+ many \b
    | \b that \s+ which \b
    | \b number \s+ formats? \b
    | \b what \s+ (is|are|was|it|its|they|a|an|the|there|others|another|has|have|had|makes?|reads?
                  |looks?|begins?|stands?|lies|comes|goes|holds|gives?|says?|only|no|every|each|any
                  |all|must|may|should|would|will|training|attends?|belongs?|remains?) \b
    | \b (go|goes|going|went) \s+ on \s+ (from|with) \b
    | \b look(s|ed|ing)? \s+ at \s+ (a|an|the|its|their|every|each|some|what|both|all|earlier|later)
      \s+ (memory|memories|images?|pictures?|tokens?|words?|keys?|positions?|patches|sources?|sounds?) \b
    | \b by \s+ beams \b
    | \b guessed \s+ tokens? \b
    | \b None \s+ is \s+ (none|all|every|no)\b
    | \b none's \b
    | \b in \s+ hand \b
    | \b a \s+ person \b
    | \b in \s+ place \s+ of \b
    | \b as \s+ it \s+ is \s+ (to|by) \b
    | \b as \s+ they \s+ (lie|stand|are) \s+ (in|on|by|beside) \b
    | \b nothing \s+ of \s+ (it|its|the|them|what) \b
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Python 3.12 splits f-strings into tokens.
TEXT_TOKENS = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
BANNED_IN_NAMES = re.compile(r"_(told|said|what)_|_(told|said)$|^test_what_")


def markdown(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered prose lines of a page, without fenced code."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def python(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of docstrings, comments and other strings of a module."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TEXT_TOKENS:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def long_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield prose lines over the limit: not tables, links, headings' anchors or code."""
    lines = path.read_text().splitlines()
    if path.suffix == ".md":
        for number, line in markdown(path):
            words = [w for w in re.split(r"\s+(?![^\[\]]*\])", line) if len(w) > 60]
            if len(line) > COLUMNS and not line.startswith(("|", "![", "<!--")) and not words:
                yield number, line
        return
    tree = ast.parse("\n".join(lines))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            expression = node.body[0]
            for number in range(expression.lineno, expression.end_lineno + 1):
                if len(lines[number - 1]) > COLUMNS and "http" not in lines[number - 1]:
                    yield number, lines[number - 1]
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        alone = token.line.strip().startswith("#")
        if token.type == tokenize.COMMENT and alone and len(token.line.rstrip()) > COLUMNS:
            yield token.start[0], token.line.rstrip()


def offences(path: Path) -> list[str]:
    """List the banned phrases, banned names and long prose lines of a file."""
    found = []
    for number, line in (markdown if path.suffix == ".md" else python)(path):
        for match in BANNED.finditer(line):
            found.append(f"{path}:{number}: {match[0]!r} in {line.strip()[:110]!r}")
    if path.suffix == ".py":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name = re.match(r"\s*(?:def|class) (\w+)", line)
            if name and BANNED_IN_NAMES.search(name[1]):
                found.append(f"{path}:{number}: name {name[1]}")
    found += [f"{path}:{number}: {len(line)} columns" for number, line in long_lines(path)]
    return found


def files(roots: list[Path]) -> list[Path]:
    """List the Markdown and Python files under some files and folders, but not this one."""
    found = []
    for root in roots:
        found += [root] if root.is_file() else sorted([*root.rglob("*.py"), *root.rglob("*.md")])
    return [path for path in found if path.resolve() != Path(__file__).resolve()]


def default_files() -> list[Path]:
    pages = [*ROOT.glob("*.md"), ROOT / "run.py"]
    return files([*sorted(pages), *(ROOT / name for name in FOLDERS if (ROOT / name).exists())])


@pytest.mark.parametrize("path", default_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_english(path):
    assert not offences(path), "\n".join(offences(path))


@pytest.mark.parametrize(
    "line",
    [
        "a misspelt field is told in one line",
        "What is lost when images are taken for others",
        "goes on from the last checkpoint",
        "layers that look at a memory",
        "the number formats of parameters",
    ],
)
def test_the_dialect_is_found(tmp_path, line):
    page = tmp_path / "page.md"
    page.write_text(line + "\n")
    assert offences(page)


if __name__ == "__main__":
    listed = [line for path in files([Path(name) for name in sys.argv[1:]]) for line in offences(path)]
    print("\n".join([*listed, f"{len(listed)} offences"]))
    sys.exit(bool(listed))
