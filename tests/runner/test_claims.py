"""Claims: comparison, printed line, and the claim in the docstring of each experiment."""

import ast
import json
import re

import pytest

from attnlab.runner.claims import Claim
from attnlab.runner.exit_codes import ExitCode
from tests.programs import ROOT, call

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
# The threshold is measured: the loss of the initial checkpoint.
WITHOUT_THRESHOLD = {"finetune"}

# Fewer steps and rows than the experiment's 400 and 32: both claims reach 100%.
SHORT = [f"--config.train.{name}=150" for name in ("steps", "eval_every", "checkpoint_every")]
SHORT += ["--config.data.batch_size=16"]
SHUFFLED = '''

@dataclass(frozen=True, kw_only=True)
class ShuffledPronouns(Pronouns):
    """Pronouns with the training sentences' labels permuted among the sentences."""

    def records(self, split: str) -> list[Sentence]:
        """Return the sentences, in training with each other's labels."""
        records = super().records(split)
        if split != "train":
            return records
        order = np.random.default_rng(0).permutation(len(records))
        return [Sentence(record.text, records[i].antecedent) for record, i in zip(records, order)]


def get_config(get_config=get_config) -> Experiment:
    """Return the experiment with shuffled labels."""
    import dataclasses

    return dataclasses.replace(get_config(), data=ShuffledPronouns(sequence_length=64, batch_size=32))
'''


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
    """Return the source of the threshold of each `trained.claim(...)` in an experiment."""
    return [
        ast.unparse(node.args[3])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "claim"
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_checks_the_claim_of_its_docstring(path):
    """The claim in the docstring contains every threshold that `report` checks."""
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


@pytest.mark.slow
def test_claim_holds_and_fails_with_shuffled_labels(tmp_path, capfd):
    """With shuffled training labels the same command refutes the claim."""
    shuffled = tmp_path / "shuffled_pronoun.py"
    shuffled.write_text((ROOT / "experiments" / "pronoun.py").read_text() + SHUFFLED)
    claims, printed = {}, {}
    for config in ("pronoun", str(shuffled)):
        workdir = tmp_path / f"run_{len(claims)}"
        code = ExitCode.DONE if config == "pronoun" else ExitCode.CLAIM_FAILED
        assert call(f"--config={config}", f"--workdir={workdir}", *SHORT) == code
        claims[config] = json.loads((workdir / "report.json").read_text())["claims"]
        printed[config] = capfd.readouterr().out
    texts = ["pronouns resolved", "sentences where the best head peaks on the antecedent"]
    for config, held, verdict in (("pronoun", True, "holds"), (str(shuffled), False, "FAILS")):
        assert [claim["claim"] for claim in claims[config]] == texts
        assert [claim["threshold"] for claim in claims[config]] == [0.99, 0.95]
        assert [claim["held"] for claim in claims[config]] == [held, held]
        for claim in claims[config]:
            assert (claim["value"] >= claim["threshold"]) is held
            assert f"claim {verdict}: {claim['claim']}: {claim['value']:.4g} >= " in printed[config]
    assert claims[str(shuffled)][0]["value"] < 0.5  # worse than always naming the nearest noun
