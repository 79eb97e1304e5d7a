"""Contrastive image-text models: CLIP and SigLIP."""

from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError, check_fields
from attnlab.layers.attention import SegmentIds, documents
from attnlab.layers.contrastive_loss import ClipLoss, PairLogits, SiglipLoss
from attnlab.layers.linear import Linear, parameter
from attnlab.layers.loss_terms import LossTerms
from attnlab.layers.pooling import pooled_width
from attnlab.layers.position_wise import LayerNormConfig, RMSNormConfig
from attnlab.layers.specs import Learned, NoPositions, RelativeBias, Rotary, Sinusoidal
from attnlab.models.config import Model, ModelConfig, TextConfig
from attnlab.models.decoder import TextModel
from attnlab.models.flops import TokenFlops
from attnlab.models.vit import ViT, ViTConfig
from attnlab.sharding import constrain, out_sharding


@dataclass(frozen=True)
class LastToken:
    """Pools the last non-padding token of a text.

    SigLIP uses this with padding as part of the text, so the text fills the row.
    """

    def token_index(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Return the index of the pooled token in each row."""
        del tokens
        return jnp.max(jnp.where(segments > 0, jnp.arange(segments.shape[1])[None], 0), axis=1)


@dataclass(frozen=True)
class EndOfText:
    """Pools the first token with the id `token` (CLIP); None means the highest id of the text."""

    token: int | None = None

    def __post_init__(self):
        check_fields(self, "token", least=0)

    def token_index(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Return the index of the pooled token in each row."""
        valid_tokens = jnp.where(segments > 0, tokens, -1)
        return jnp.argmax(valid_tokens if self.token is None else valid_tokens == self.token, axis=1)


@dataclass(frozen=True)
class TextTowerConfig(TextConfig):
    """A Transformer that encodes a text as one vector.

    Attributes:
      pooling: token whose activations represent the text: `LastToken` or `EndOfText`.
    """

    pooling: LastToken | EndOfText = field(default_factory=LastToken)
    positions: Rotary | Learned | Sinusoidal | RelativeBias | NoPositions = field(
        default_factory=lambda: Learned(77)
    )
    norm: RMSNormConfig | LayerNormConfig = field(default_factory=LayerNormConfig)

    def build(self, vocab_size: int) -> "TextTower":
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return TextTower(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)


class TextTower(TextModel):
    """A text encoder with one output vector per row."""

    config: TextTowerConfig

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B 1 E"]:
        """Return the activations of each row's pooled token; see `Model`."""
        x, _ = self.forward(tokens, segment_ids, positions, deterministic=deterministic)
        index = self.config.pooling.token_index(tokens, documents(segment_ids, tokens).ids)
        selected = index[:, None] == jnp.arange(tokens.shape[1])[None]
        return jnp.sum(x * selected[..., None].astype(x.dtype), axis=1, keepdims=True)

    def loss_terms(self, *arguments, **named):
        """Raise an error: the tower has no logits to train.

        Raises:
          InputError: always.
        """
        raise InputError("a TextTower has no logits to train: make it the text tower of a Contrastive")


@dataclass(frozen=True)
class ProjectionConfig:
    """A linear map from a tower's output to the shared embedding space."""

    bias: bool = False


@dataclass(frozen=True)
class ContrastiveConfig(ModelConfig):
    """An image tower and a text tower; the source of a row is its image, its tokens are its text.

    Attributes:
      image: image tower, without a classification head.
      text: text tower.
      width: width of the shared embedding space.
      image_projection: projection of the image tower's output; None uses the output unchanged,
        which must then have this width.
      text_projection: projection of the text tower's output; None as for images.
      objective: `ClipLoss` or `SiglipLoss`.
    """

    image: ViTConfig = field(default_factory=lambda: ViTConfig(classes=0))
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: int = 512
    image_projection: ProjectionConfig | None = field(default_factory=ProjectionConfig)
    text_projection: ProjectionConfig | None = field(default_factory=ProjectionConfig)
    objective: ClipLoss | SiglipLoss = field(default_factory=ClipLoss)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1")
        if self.image.classes != 0:
            raise ValueError("image.classes must be 0: an image tower has no classification head")
        for name in ("image", "text"):
            if getattr(self, f"{name}_projection") is None and self._pooled(name) != self.width:
                raise ValueError(
                    f"width={self.width} must be {self._pooled(name)}, that of the {name} tower, because "
                    f"{name}_projection is none"
                )

    def _pooled(self, name: str) -> int:
        """Return the width of a tower's output."""
        return self.text.width if name == "text" else pooled_width(self.image.pooling, self.image.width)

    def build(self, vocab_size: int) -> "Contrastive":
        """See `ModelConfig.build`."""
        return Contrastive(self, vocab_size)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """See `ModelConfig.source_shape`."""
        return self.image.encoder_input_shape

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return self.image.uses_dropout or self.text.uses_dropout

    def check_length(self, length: int) -> None:
        """See `ModelConfig.check_length`."""
        self.text.check_length(length)

    def with_vocab_size(self, vocab_size: int) -> Self:
        """See `ModelConfig.with_vocab_size`."""
        return replace(self, text=self.text.with_vocab_size(vocab_size))

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`; pair logits, which depend on the batch, are omitted."""
        del vocab_size
        towers = [name for name in ("image", "text") if getattr(self, f"{name}_projection")]
        projections = TokenFlops(sum(2.0 * self._pooled(name) * self.width for name in towers), 0.0)
        once = self.image.source_flops(self.image.image[0]) + projections
        return self.text.layer_flops(length) + once * (1 / length)


class Contrastive(Model):
    """A two-tower model: unit vectors of images and texts, and logits of all pairs of the batch.

    Attributes:
      config: see `ContrastiveConfig`.
      vocab_size: number of tokens of the tokenizer.
    """

    config: ContrastiveConfig
    vocab_size: int

    def setup(self):
        """Declare the towers, their projections, and the scale and bias of the logits."""
        c = self.config
        self.image, self.text = ViT(c.image), c.text.build(self.vocab_size)
        for name, tower in (("image", c.image), ("text", c.text)):
            if projection := getattr(c, f"{name}_projection"):
                std = tower.init.hidden_std(tower.width)
                axes, sizes = ("embed", "norm"), ((c._pooled(name),), (c.width,))
                layer = Linear(*sizes, axes, std, projection.bias, tower.dtypes)
                setattr(self, f"{name}_projection", layer)
        dtypes = c.text.dtypes
        self.logit_scale = parameter(
            self, "logit_scale", (), (), dtypes, mean=c.objective.init_logit_scale, wide=True
        )
        if isinstance(c.objective, SiglipLoss):
            self.logit_bias = parameter(
                self, "logit_bias", (), (), dtypes, mean=c.objective.init_logit_bias, wide=True
            )

    def encode_image(
        self,
        source: Float[Array, "B height width channels"],
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B width"]:
        """Return one unit vector per image; see `ViT.encode` for the arguments."""
        x = self.image.pooled(self.image.encode(source, source_segments, deterministic=deterministic))
        return _normalised(self.image_projection(x) if self.config.image_projection else x)

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B width"]:
        """Return one unit vector per text; see `Model` for the arguments."""
        x = self.text.hidden(tokens, segment_ids, positions, deterministic=deterministic)
        return _normalised(self.text_projection(x) if self.config.text_projection else x)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        source: Float[Array, "B height width channels"],
        source_segments: SegmentIds = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B width"], Float[Array, "B width"]]:
        """Return the vectors of a batch's images and texts; see `Model`."""
        images = self.encode_image(source, source_segments, deterministic=deterministic)
        return images, self.encode_text(tokens, segment_ids, positions, deterministic=deterministic)

    def pair_logits(
        self,
        images: Float[Array, "B width"],
        texts: Float[Array, "B width"],
        segment_ids: SegmentIds = None,
    ) -> PairLogits:
        """Return the logits of all pairs; rows without tokens are padding of the batch."""
        all_images, all_texts = (constrain(x, None, None) for x in (images, texts))
        if segment_ids is None:
            segment_ids = jnp.ones(len(texts), jnp.int32)
        valid = constrain(jnp.any(segment_ids.reshape(len(texts), -1) > 0, axis=1), None)
        return PairLogits(self._logits(texts, all_images), self._logits(images, all_texts), valid)

    def _logits(self, x: Float[Array, "B width"], others: Float[Array, "C width"]) -> Float[Array, "B C"]:
        spec = out_sharding("batch", None)
        y = jnp.einsum("be,ce->bc", x, others, precision="highest", out_sharding=spec)
        y = y * jnp.exp(self.logit_scale)
        return y + self.logit_bias if isinstance(self.config.objective, SiglipLoss) else y

    def features(self, tokens, segment_ids=None, positions=None, **inputs) -> PairLogits:
        """Return the logits of all pairs of the batch."""
        return self.pair_logits(*self.hidden(tokens, segment_ids, positions, **inputs), segment_ids)

    def logits_of(self, x: PairLogits) -> Float[Array, "B 1 B"]:
        """Return each text's logits over the images of the batch."""
        return x.of_text[:, None]

    def loss_terms_of(self, x: PairLogits, targets: Int[Array, "B T"]) -> LossTerms:
        """Return the loss terms of each row, repeated at all of its tokens.

        Give exactly one token of each row a loss weight. `targets` only provides the shape: the
        target of a row is its own pair.
        """
        terms = self.config.objective.loss_terms(x)
        return LossTerms(*(x[:, None] + jnp.zeros(targets.shape, x.dtype) for x in terms))


def _normalised(x: Float[Array, "B 1 width"]) -> Float[Array, "B width"]:
    x = x[:, 0].astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-30))  # padding rows can be all zeros
