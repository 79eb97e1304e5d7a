"""The compared implementations of each benchmark compute the same results."""

import importlib.util
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


PROGRAM = """
%start (p: bf16[8]) -> bf16[16] {
  %p = bf16[8] parameter(0)
  ROOT %g = bf16[16] all-gather(%p), channel_id=1, dimensions={0}
}

%end (p: bf16[16]) -> bf16[16] {
  %q = bf16[16] parameter(0)
  ROOT %h = bf16[16] all-gather(%q), channel_id=1, dimensions={0}
}

%body (s: (bf16[8], s32[])) -> (bf16[8], s32[]) {
  %a = bf16[16] fusion(%x), kind=kCustom, calls=%start, backend_config={"estimated_cycles":"10"}
  %b = bf16[16] fusion(%a), kind=kCustom, calls=%end
  %c = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%y), channel_id=2
  %d = f32[4] collective-permute-done(%c)
  %e = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%z), channel_id=3
  %f = f32[4] collective-permute-done(%e)
  %i = s32[] get-tuple-element(%s), index=1
  %step = s32[] constant(2)
  %j = s32[] add(%i, %step)
  ROOT %t = (bf16[8], s32[]) tuple(%x, %j)
}

%condition (s: (bf16[8], s32[])) -> pred[] {
  %n = s32[] constant(9)
  %k = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%k, %n), direction=LT
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %w = (bf16[8], s32[]) while(%t), condition=%condition, body=%body
  ROOT %r = f32[2] all-reduce(%u), channel_id=4
}
"""


def test_collectives_of_a_program_count_once_for_each_execution():
    """In a loop to 9 in steps of 2: a gather whose start and end are fusions, and two sends."""
    spec = importlib.util.spec_from_file_location("compiled", ROOT / "benchmarks" / "compiled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    totals = module.executed(PROGRAM)
    gathered, sent, reduced = 5 * 16 * 2, 5 * 2 * 4 * 4, 2 * 4
    assert totals == {
        "cycles": 50,
        "all-gather": gathered,
        "collective-permute": sent,
        "all-reduce": reduced,
        "collective": gathered + sent + reduced,
    }
