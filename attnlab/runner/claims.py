"""Claims: comparisons of a measured number with the threshold that an experiment states."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from attnlab.paths import as_json

Comparison: TypeAlias = Literal["<", "<=", ">", ">="]
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Claim:
    """A claim with its measured value and threshold.

    Attributes:
      text: the name of the quantity, such as "pronouns resolved".
      value: the measured number.
      comparison: how `value` must compare with `threshold` for the claim to hold.
      threshold: the number in the experiment's docstring, or a measured baseline.
    """

    text: str
    value: float
    comparison: Comparison
    threshold: float

    @property
    def held(self) -> bool:
        """Whether the claim holds; False if the value is NaN."""
        return bool(COMPARISONS[self.comparison](self.value, self.threshold))

    def __str__(self) -> str:
        """Return the line that the runner prints."""
        verdict = "holds" if self.held else "FAILS"
        return f"claim {verdict}: {self.text}: {self.value:.4g} {self.comparison} {self.threshold:.4g}"

    def as_json(self) -> dict[str, Any]:
        """Return the claim as an entry of `claims` in `report.json`."""
        return {
            "claim": self.text,
            "value": as_json(self.value),
            "comparison": self.comparison,
            "threshold": as_json(self.threshold),
            "held": self.held,
        }
