"""Cases of a parametrized test that CI runs; `python -m tests.long` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def sample(cases: Iterable[Any], every: int) -> list[Any]:
    """Return the cases for `parametrize`: the first of each `every` cases, the others as `long`."""
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [long(*case) if n % every else pytest.param(*case) for n, case in enumerate(listed)]


def long(*case: Any) -> Any:
    """Return a case for `parametrize` that CI leaves out."""
    return pytest.param(*case, marks=pytest.mark.long)
