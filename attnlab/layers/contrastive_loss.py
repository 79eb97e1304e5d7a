"""Contrastive losses over all image-text pairs of a batch: softmax (CLIP) and sigmoid (SigLIP)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.layers.loss_terms import LossTerms
from attnlab.sharding import constrain


class PairLogits(NamedTuple):
    """Logits of all image-text pairs of a batch.

    Attributes:
      of_text: logits of each text (first dimension, sharded as the batch) with every image.
      of_image: logits of each image (first dimension, sharded as the batch) with every text.
      valid: whether each row is a real pair, not padding of the batch.
    """

    of_text: Float[Array, "B B"]
    of_image: Float[Array, "B B"]
    valid: Bool[Array, " B"]


@dataclass(frozen=True)
class ClipLoss:
    """Mean of the image-to-text and text-to-image cross-entropies.

    CLIP, arXiv 2103.00020, figure 3.

    Attributes:
      init_logit_scale: initial value of the learned log of the logits' factor.
    """

    init_logit_scale: float = 2.6592  # log(1 / 0.07)

    def loss_terms(self, logits: PairLogits) -> LossTerms:
        """Return the terms of each row, averaged over both directions."""
        directions = [_loss_terms(y, logits.valid, jax.nn.logsumexp) for y in logits[:2]]
        return LossTerms(*(0.5 * (a + b) for a, b in zip(*directions, strict=True)))


@dataclass(frozen=True)
class SiglipLoss:
    """Binary cross-entropy of every pair of the batch (SigLIP, arXiv 2303.15343, section 3.2).

    The loss of a text is the sum of log(1 + exp(l)) over the logits l of all images, minus the
    logit of the text's own image.

    Attributes:
      init_logit_scale: initial value of the learned log of the logits' factor.
      init_logit_bias: initial value of the learned bias of the logits.
    """

    init_logit_scale: float = 2.302585092994046  # log(10)
    init_logit_bias: float = -10.0

    def loss_terms(self, logits: PairLogits) -> LossTerms:
        """Return the terms of each text."""

        def softplus_sum(y, axis, where):
            return jnp.sum(jnp.where(where, jax.nn.softplus(y), 0.0), axis=axis)

        of_text, of_image = (_loss_terms(y, logits.valid, softplus_sum) for y in logits[:2])
        return of_text._replace(correct=0.5 * (of_text.correct + of_image.correct))


def _loss_terms(y: Float[Array, "B B"], valid: Bool[Array, " B"], reduce: Callable) -> LossTerms:
    """Return the loss terms of logits whose targets are on the diagonal.

    `reduce(y, axis, where)` gives the term `lse`: the log-sum-exp, or the sum of softplus.
    """
    b = y.shape[0]
    is_target = constrain(jnp.arange(b), "batch")[:, None] == jnp.arange(b)[None]
    valid_columns = constrain(jnp.broadcast_to(valid[None], (b, b)), "batch", None)
    target = jnp.sum(jnp.where(is_target, y, 0.0), axis=-1)
    mean = jnp.sum(jnp.where(valid_columns, y, 0.0), axis=-1) / jnp.maximum(jnp.sum(valid), 1)
    # Padding rows keep their own logit, so that no reduction is empty.
    counted = valid_columns | is_target
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(counted, y, -jnp.inf), axis=-1))
    correct = (target >= highest).astype(jnp.float32)
    return LossTerms(target, reduce(y, axis=-1, where=counted), mean, correct)
