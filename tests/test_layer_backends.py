"""The attention backend of each layer of the experiments on each accelerator.

The programs are only traced, so no accelerator is needed.
"""

import re

import pytest

from attnlab import config as configs
from attnlab.train.attention_backends import layer_backends
from attnlab.train.session import Session
from attnlab.train.targets import target_mesh
from tests.programs import ROOT
from tests.train.small import TOKENIZER

TARGETS = ("v5e:1x1", "v6e:1x1", "h100:1")
EXPERIMENTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if path.stem != "__init__" and "recurrent" not in path.stem
)
PARTS = ("", ".encoder", ".decoder", ".image", ".text")


def slow_paths(name, target):
    """Return why each layer that runs plain JAX on the target cannot use the best kernel there."""
    e = configs.load(str(ROOT / "experiments" / f"{name}.py")).config
    for part in PARTS:
        if part[1:] in ("", *vars(e.model)):
            e = configs.override(e, f"model{part}.dtypes.compute", "bfloat16") if has_dtypes(e, part) else e
    layers = layer_backends(Session(e, target_mesh(target, "single"), TOKENIZER))
    assert layers
    return {layer.refusals[0].partition(": ")[2] for layer in layers if layer.is_slow}


def has_dtypes(e, part):
    return hasattr(getattr(e.model, part[1:]) if part else e.model, "dtypes")


def documented():
    """Return the rows of the table of slow paths: {(platform, reason): experiments}."""
    text = (ROOT / "docs" / "attention.md").read_text()
    table = text.partition("### Slow paths")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (TPU|GPU) \| ([^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    return {(platform, reason): re.findall(r"`(\w+)`", names) for platform, reason, names in rows}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_docs_give_the_reason_of_each_slow_path(target):
    platform = "GPU" if target.startswith("h100") else "TPU"
    found: dict[str, list[str]] = {}
    for name in EXPERIMENTS:
        for reason in slow_paths(name, target):
            found.setdefault(reason, []).append(name)
    assert found == {reason: names for (p, reason), names in documented().items() if p == platform}


def test_unpacked_rows_take_cudnn_on_a_gpu():
    assert slow_paths("digits", "h100:1") == set()
