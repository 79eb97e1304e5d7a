"""What is lost when images and texts that belong together are taken for pairs of others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.layers.readout import LossTerms
from attnlab.sharding import constrain


class PairLogits(NamedTuple):
    """Logits of all pairs of a batch.

    Attributes:
      of_text: of each text with every image; the first dimension is laid out as the batch.
      of_image: of each image with every text, likewise.
      valid: which rows are no filling.
    """

    of_text: Float[Array, "B B"]
    of_image: Float[Array, "B B"]
    valid: Bool[Array, " B"]


@dataclass(frozen=True)
class ClipLoss:
    """Which of the batch's texts is an image's, and the other way round: the mean of two cross-entropies
    (CLIP, arXiv 2103.00020, figure 3).

    Attributes:
      init_logit_scale: where the logarithm of the logits' learned factor starts.
    """

    init_logit_scale: float = 2.6592  # log(1 / 0.07)

    def loss_terms(self, logits: PairLogits) -> LossTerms:
        """Of each row, the mean of both ways."""
        parts = [_loss_terms(y, logits.valid, jax.nn.logsumexp) for y in logits[:2]]
        return LossTerms(*(0.5 * (a + b) for a, b in zip(*parts, strict=True)))


@dataclass(frozen=True)
class SiglipLoss:
    """Whether a pair belongs together, for each of the batch's by itself (SigLIP, arXiv 2303.15343,
    section 3.2).

    The loss of a text is the sum of log(1 + exp(l)) over all images, less the logit l of its own.

    Attributes:
      init_logit_scale: where the logarithm of the logits' learned factor starts.
      init_logit_bias: where the learned number that is added to them starts.
    """

    init_logit_scale: float = 2.302585092994046  # log(10)
    init_logit_bias: float = -10.0

    def loss_terms(self, logits: PairLogits) -> LossTerms:
        """Of each text."""

        def total(y, axis, where):
            return jnp.sum(jnp.where(where, jax.nn.softplus(y), 0.0), axis=axis)

        s, other = (_loss_terms(y, logits.valid, total) for y in logits[:2])
        return s._replace(correct=0.5 * (s.correct + other.correct))


def _loss_terms(y: Float[Array, "B B"], valid: Bool[Array, " B"], total: Callable) -> LossTerms:
    """Of a row's logits, where its own is on the diagonal and `total` is what stands for their sum."""
    b = y.shape[0]
    own = constrain(jnp.arange(b), "batch")[:, None] == jnp.arange(b)[None]
    among = constrain(jnp.broadcast_to(valid[None], (b, b)), "batch", None)
    target = jnp.sum(jnp.where(own, y, 0.0), axis=-1)
    mean = jnp.sum(jnp.where(among, y, 0.0), axis=-1) / jnp.maximum(jnp.sum(valid), 1)
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(among | own, y, -jnp.inf), axis=-1))
    return LossTerms(
        target, total(y, axis=-1, where=among | own), mean, (target >= highest).astype(jnp.float32)
    )
