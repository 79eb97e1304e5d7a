"""Runs the tests that CI has no time for, and writes their results to docs/long_tests.md.

Run it with `python -m tests.long`. It takes half an hour on two cores. Programs for a TPU need the
extra `preflight`; without it their tests are skipped.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from tests.programs import ROOT

PAGE = ROOT / "docs" / "long_tests.md"
TEXT = """# Long tests

`.ci/run` leaves out the tests marked `long`. `python -m tests.long` runs them and writes this page.
The last run was on commit {commit}, with Python {python} and JAX {jax}.

| file | tests | passed | failed | seconds |
| --- | --- | --- | --- | --- |
{rows}
"""


def main() -> int:
    """Run the tests, write the page and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "long and not parity"]
        code = subprocess.run([*command, f"--junitxml={results}"], cwd=ROOT).returncode
        if results.exists():
            PAGE.write_text(page(ElementTree.parse(results).iter("testcase")))
    return code


def page(cases) -> str:
    """Return the page with one row per test file."""
    files = defaultdict(list)
    for case in cases:
        files[case.get("classname").replace(".", "/") + ".py"].append(case)
    rows = []
    for file, tests in sorted(files.items()):
        failed = sum(any(child.tag in ("failure", "error") for child in test) for test in tests)
        passed = sum(
            len(test) == 0 or all(child.tag.startswith("system") for child in test) for test in tests
        )
        seconds = sum(float(test.get("time")) for test in tests)
        rows.append(f"| `{file}` | {len(tests)} | {passed} | {failed} | {seconds:.0f} |")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    python = ".".join(map(str, sys.version_info[:3]))
    commit = git.stdout.strip() or "unknown"
    return TEXT.format(commit=commit, python=python, jax=version("jax"), rows="\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
