"""Claims: the comparison, the printed line, and that each experiment checks the claim it states."""

import ast
import re

import pytest

from attnlab.runner.claims import Claim
from tests.programs import ROOT

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
# Its threshold is measured, the loss of the checkpoint that it starts from.
WITHOUT_THRESHOLD = {"finetune"}


@pytest.mark.parametrize(
    ("value", "comparison", "held"),
    [
        (2.0, "<", False),
        (2.0, "<=", True),
        (2.0, ">", False),
        (2.0, ">=", True),
        (1.9, "<", True),
        (2.1, ">", True),
        (float("nan"), "<", False),
        (float("nan"), ">=", False),
    ],
)
def test_claim_compares_value_with_threshold(value, comparison, held):
    claim = Claim("bits per byte", value, comparison, 2.0)
    assert claim.held is held
    assert claim.as_json()["held"] is held
    assert str(claim).startswith("claim holds: " if held else "claim FAILS: ")


def test_claim_as_text_and_json():
    claim = Claim("pronouns resolved", 0.98765, ">=", 0.99)
    assert str(claim) == "claim FAILS: pronouns resolved: 0.9877 >= 0.99"
    expected = {"claim": "pronouns resolved", "value": 0.98765, "comparison": ">=", "threshold": 0.99}
    assert claim.as_json() == expected | {"held": False}


def thresholds(tree: ast.Module) -> list[str]:
    """Return the source of the threshold of each `trained.claim(...)` of an experiment."""
    return [
        ast.unparse(node.args[3])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "claim"
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_checks_the_claim_of_its_docstring(path):
    """The docstring states a claim, and its numbers include every threshold checked."""
    tree = ast.parse(path.read_text())
    page = ast.get_docstring(tree) or ""
    stated = re.search(r"^Claim: (.*?)(?=^\w+: )", page, re.DOTALL | re.MULTILINE)
    assert stated, f"{path.name}: its docstring has no claim"
    checked = thresholds(tree)
    assert checked, f"{path.name}: report() never calls trained.claim"
    numbers = {float(n) / (100 if unit else 1) for n, unit in re.findall(r"(\d+(?:\.\d+)?)(%?)", stated[1])}
    literals = {float(text) for text in checked if re.fullmatch(r"[\d.]+", text)}
    if path.stem in WITHOUT_THRESHOLD:
        assert not literals
    else:
        assert literals and literals <= numbers, (
            f"{path.name}: checks {literals}, its docstring has {numbers}"
        )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_states_command_and_source(path):
    page = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert (
        f"--config={path.stem}" in page
        or f"--config=experiments/{path.name}" in page
        or (path.stem == "lm_docs" and "python run.py\n" in page + "\n")
    )
    assert re.search(r"^Source: \S", page, re.MULTILINE)
