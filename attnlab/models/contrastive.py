"""An image and a text each become a vector, near if they belong together: CLIP and SigLIP."""

from dataclasses import dataclass, field, replace
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.layers.attention import NoPositions, RelativeBias, Rotary
from attnlab.layers.contrastive_loss import ClipLoss, PairLogits, SiglipLoss
from attnlab.layers.linear import Linear
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import parameter
from attnlab.layers.pooling import pooled_width
from attnlab.layers.readout import LossTerms
from attnlab.models.base import ModelConfig, TokenFlops
from attnlab.models.text import Learned, Sinusoidal, TextConfig, TextModel
from attnlab.models.vit import ViT, ViTConfig
from attnlab.sharding import constrain, out_sharding


@dataclass(frozen=True)
class LastToken:
    """The last token that is there stands for a text (SigLIP, where padding counts as there)."""

    def token_index(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Where it is in each row."""
        del tokens
        return jnp.max(jnp.where(segments > 0, jnp.arange(segments.shape[1])[None], 0), axis=1)


@dataclass(frozen=True)
class EndOfText:
    """The first token of this id stands for a text (CLIP); None is that with the highest id of the text."""

    token: int | None = None

    def token_index(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Where it is in each row."""
        valid_tokens = jnp.where(segments > 0, tokens, -1)
        return jnp.argmax(valid_tokens if self.token is None else valid_tokens == self.token, axis=1)


@dataclass(frozen=True)
class TextTowerConfig(TextConfig):
    """A Transformer that reads a text to one vector.

    Attributes:
      pooling: the token that stands for the text.
    """

    pooling: LastToken | EndOfText = field(default_factory=LastToken)
    positions: Rotary | Learned | Sinusoidal | RelativeBias | NoPositions = field(
        default_factory=lambda: Learned(77)
    )
    norm: RMSNormConfig | LayerNormConfig = field(default_factory=LayerNormConfig)

    def build(self, vocab_size: int) -> "TextTower":
        """The module of this config for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return TextTower(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)


class TextTower(TextModel):
    """Tokens in, one vector out."""

    config: TextTowerConfig

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B 1 E"]:
        """The activations of the token that stands for each text."""
        x, _ = self.forward(tokens, segment_ids, positions, None, deterministic)
        index = self.config.pooling.token_index(
            tokens, jnp.ones_like(tokens) if segment_ids is None else segment_ids
        )
        selected = index[:, None] == jnp.arange(tokens.shape[1])[None]
        return jnp.sum(x * selected[..., None].astype(x.dtype), axis=1, keepdims=True)


@dataclass(frozen=True)
class ProjectionConfig:
    """A linear map to the space of both towers."""

    bias: bool = False


@dataclass(frozen=True)
class ContrastiveConfig(ModelConfig):
    """Two towers; the source of a row is its image, and its tokens are its text.

    Attributes:
      image: the tower of images, without a head.
      text: the tower of texts.
      width: of the space that both are projected to.
      image_projection: how images are projected; None takes them as they are, of that width.
      text_projection: the same of texts.
      objective: `ClipLoss` or `SiglipLoss`.
    """

    image: ViTConfig = field(default_factory=lambda: ViTConfig(classes=0))
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: int = 512
    image_projection: ProjectionConfig | None = field(default_factory=ProjectionConfig)
    text_projection: ProjectionConfig | None = field(default_factory=ProjectionConfig)
    objective: ClipLoss | SiglipLoss = field(default_factory=ClipLoss)

    def __post_init__(self):
        if self.image.classes != 0:
            raise ValueError("image.classes must be 0: a tower has no head")
        for name in ("image", "text"):
            if getattr(self, f"{name}_projection") is None and self._pooled(name) != self.width:
                raise ValueError(
                    f"width={self.width} must be {self._pooled(name)}, that of the {name} tower, which is "
                    "not projected"
                )

    def _pooled(self, name: str) -> int:
        """Width of what a tower gives."""
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
        """See `ModelConfig.token_flops`; products of pairs, as many as rows in a batch, are left out."""
        del vocab_size
        towers = [name for name in ("image", "text") if getattr(self, f"{name}_projection")]
        projections = TokenFlops(sum(2.0 * self._pooled(name) * self.width for name in towers), 0.0)
        once = self.image.source_flops(self.image.image[0]) + projections
        return self.text.layer_flops(length) + once * (1 / length)


class Contrastive(nn.Module):
    """An image and a text in, two vectors of length 1 out, and how near each is to each other of the batch.

    Attributes:
      config: see `ContrastiveConfig`.
      vocab_size: of the tokenizer.
    """

    config: ContrastiveConfig
    vocab_size: int

    def setup(self):
        """Declares the towers, their projections, and the factor and bias of logits."""
        c = self.config
        self.image, self.text = ViT(c.image), c.text.build(self.vocab_size)
        for name, tower in (("image", c.image), ("text", c.text)):
            if projection := getattr(c, f"{name}_projection"):
                std = tower.init.hidden_std(tower.width)
                axes, sizes = ("embed", "norm"), ((c._pooled(name),), (c.width,))
                layer = Linear(*sizes, axes, std, projection.bias, tower.dtypes)
                setattr(self, f"{name}_projection", layer)
        self.logit_scale = parameter(
            self, "logit_scale", (), (), c.text.dtypes, mean=c.objective.init_logit_scale
        )
        if isinstance(c.objective, SiglipLoss):
            self.logit_bias = parameter(
                self, "logit_bias", (), (), c.text.dtypes, mean=c.objective.init_logit_bias
            )

    def encode_image(
        self,
        images: Float[Array, "B height width channels"],
        segments: Int[Array, "B height"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B width"]:
        """A vector of length 1 for each image; arguments as of `ViT.encode`."""
        x = self.image.pooled(self.image.encode(images, segments, deterministic=deterministic))
        return _normalised(self.image_projection(x) if self.config.image_projection else x)

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B width"]:
        """A vector of length 1 for each text; arguments as of `TextModel.forward`."""
        x = self.text(tokens, segment_ids, positions, deterministic)
        return _normalised(self.text_projection(x) if self.config.text_projection else x)

    def hidden(
        self, tokens, segment_ids=None, positions=None, source=None, source_segments=None, deterministic=True
    ) -> tuple[Float[Array, "B width"], Float[Array, "B width"]]:
        """The vectors of a batch's images and of its texts; arguments as of `Batch.inputs`."""
        images = self.encode_image(source, source_segments, deterministic)
        return images, self.encode_text(tokens, segment_ids, positions, deterministic)

    def pair_logits(
        self,
        images: Float[Array, "B width"],
        texts: Float[Array, "B width"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> PairLogits:
        """Logits of all pairs of these vectors; rows without a token are none."""
        every_image, every_text = (constrain(x, None, None) for x in (images, texts))
        if segment_ids is None:
            segment_ids = jnp.ones((len(texts), 1), jnp.int32)
        valid = constrain(jnp.any(segment_ids > 0, axis=1), None)
        return PairLogits(self._logits(texts, every_image), self._logits(images, every_text), valid)

    def _logits(self, x: Float[Array, "B width"], others: Float[Array, "C width"]) -> Float[Array, "B C"]:
        where = out_sharding("batch", None)
        y = jnp.einsum("be,ce->bc", x, others, precision="highest", out_sharding=where)
        y = y * jnp.exp(self.logit_scale.astype(jnp.float32))
        return y + self.logit_bias.astype(jnp.float32) if isinstance(self.config.objective, SiglipLoss) else y

    def __call__(
        self, tokens, segment_ids=None, positions=None, source=None, source_segments=None, deterministic=True
    ) -> Float[Array, "B 1 B"]:
        """Logits of which of the batch's images is each text's."""
        vectors = self.hidden(tokens, segment_ids, positions, source, source_segments, deterministic)
        return self.pair_logits(*vectors, segment_ids).of_text[:, None]

    def loss_terms(
        self,
        tokens,
        targets: Int[Array, "B T"],
        segment_ids=None,
        positions=None,
        source=None,
        source_segments=None,
        deterministic=True,
    ) -> LossTerms:
        """What a loss needs of each row's pairs, the same at all of its tokens: give one a weight.

        What is told apart is the batch itself, and no target is read.
        """
        vectors = self.hidden(tokens, segment_ids, positions, source, source_segments, deterministic)
        terms = self.config.objective.loss_terms(self.pair_logits(*vectors, segment_ids))
        return LossTerms(*(x[:, None] + jnp.zeros(targets.shape, x.dtype) for x in terms))


def _normalised(x: Float[Array, "B 1 width"]) -> Float[Array, "B width"]:
    x = x[:, 0].astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-30))  # a row that is filled may have nothing to show
