"""Compiles a program again without the kernels of attention that the compiler refused."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attnlab.attention.backends.registry import PLAIN_JAX, Selection, exclude_backends, record_selections

# Messages of the compilers about a kernel: scoped memory of a TPU core, Mosaic, cuDNN and Triton.
_KERNEL_ERRORS = re.compile(r"memory space [vs]mem|scoped|mosaic|cudnn|triton|ptxas", re.IGNORECASE)
_DEVICE_MEMORY = "memory space hbm"  # the whole program is too large: another kernel is no cure


def kernel_scope(name: str) -> str:
    """Return the scope of a kernel, which the compiler quotes in its errors: it names the cure."""
    return f"attend(backend={name}; to avoid it: with exclude_backends({name}))"


@dataclass
class Fallback:
    """Runs functions, and runs them again without the kernels that the compiler refused.

    Attributes:
      log: called with a line for each refused kernel.
      refused: the refused backends, with the reason. Later calls exclude them too.
    """

    log: Callable[[str], None] = warnings.warn
    refused: dict[str, str] = field(default_factory=dict)

    def __call__(self, function: Callable[..., Any], *args) -> Any:
        """Return `function(*args)`, which compiles a program that calls `attend`.

        The function is called again after a refusal, so it must not have run any program before.
        """
        while True:
            selections: list[Selection] = []
            try:
                with exclude_backends(**self.refused), record_selections(selections.append):
                    return function(*args)
            except Exception as error:  # Mosaic and XLA raise different types
                # A backend that the caller named is not excluded: it would be refused again.
                refused = sorted({*refused_kernels(str(error), selections)} - {*self.refused})
                if not refused:
                    raise
                reason = _first_line(str(error))
            self.refused |= dict.fromkeys(refused, f"the compiler refused it: {reason}")
            self.log(f"attention: compiling again without {' and '.join(refused)}, refused with: {reason}")


def refused_kernels(message: str, selections: list[Selection]) -> list[str]:
    """Return the kernels among the selected backends that a compiler's message is about."""
    if _DEVICE_MEMORY in message or not _KERNEL_ERRORS.search(message):
        return []
    used = (s.kernel or s.backend for s in selections)
    kernels = dict.fromkeys(name for name in used if name not in PLAIN_JAX)
    return [name for name in kernels if kernel_scope(name) in message] or list(kernels)


def _first_line(message: str, length: int = 200) -> str:
    line = message.strip().splitlines()[0] if message.strip() else "no message"
    return line if len(line) <= length else f"{line[:length]}..."
