"""Cross-entropy with label smoothing and z-loss, as sums over tokens."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.layers.loss_terms import LossTerms


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the target tokens.

    Attributes:
      label_smoothing: probability mass of the target that is spread uniformly over the vocabulary
        (Szegedy et al. 2016, section 7).
      z_loss: weight of the squared log-sum-exp, which keeps logits small (PaLM, arXiv 2204.02311,
        section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError("label_smoothing must be at least 0 and less than 1, z_loss at least 0")

    def __call__(self, s: LossTerms, weights: Float[Array, "B T"]) -> Float[Array, ""]:
        """Return the weighted sum of the loss over tokens, in nats."""
        smooth = self.label_smoothing
        expected = (1 - smooth) * s.target_logit + smooth * s.mean_logit
        return jnp.sum(weights * (s.lse - expected + self.z_loss * s.lse**2))


def token_sums(s: LossTerms, weights: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """Return weighted sums over tokens: cross-entropy in nats, and correct predictions."""
    return {
        "nats": jnp.sum(weights * (s.lse - s.target_logit)),
        "correct": jnp.sum(weights * s.correct),
    }
