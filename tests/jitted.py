"""Flax modules with compiled `init` and `apply`.

Without jax.jit, a test compiles a program for each operation of a model, which takes longer.
"""

from typing import Any

import flax.linen as nn
import jax

_STATIC = ("method", "deterministic", "mutable")


class Jitted:
    """A module whose `init` and `apply` are compiled; other attributes are those of the module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.init = jax.jit(module.init, static_argnames=_STATIC)
        self.apply = jax.jit(module.apply, static_argnames=_STATIC)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)
