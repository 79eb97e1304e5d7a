"""How a score is changed between the scaled product and the softmax."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Score(Protocol):
    """An elementwise function of the scaled scores."""

    def __call__(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """The changed scores, of the same shape."""
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class Softcap:
    """cap * tanh(score / cap): scores stay within (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float

    def __call__(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """The capped scores."""
        return self.cap * jnp.tanh(scores / self.cap)


def softcap(cap: float) -> Softcap:
    """See `Softcap`."""
    return Softcap(cap)
