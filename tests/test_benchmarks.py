"""The benchmarks compare what computes the same thing."""

import os
import subprocess
import sys

from tests.programs import ROOT


def test_peers_of_attention_agree():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "attention.py"), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "the peers agree" in done.stdout
