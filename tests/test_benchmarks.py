"""The benchmarks compare what computes the same thing."""

import os
import subprocess
import sys

import pytest

from tests.programs import ROOT


@pytest.mark.parametrize("name", ["attention"])
def test_peers_agree(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "the peers agree" in done.stdout
