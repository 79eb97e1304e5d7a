"""The compared implementations of each benchmark compute the same results."""

import os
import subprocess
import sys

import pytest

from tests.programs import ROOT


@pytest.mark.parametrize(
    "command",
    [
        ["attention.py", "--check"],
        pytest.param(["generate.py", "--check", "--layers=1"], marks=pytest.mark.parity),
    ],
    ids=lambda command: command[0],
)
def test_implementations_agree(command):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "the implementations agree" in done.stdout
