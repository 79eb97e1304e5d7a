"""Vision Transformers over patches of an image (ViT, arXiv 2010.11929)."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.errors import InputError
from attnlab.layers.attention import EncoderOutput, SegmentIds, SequenceInputs, documents
from attnlab.layers.experts import ExpertsConfig
from attnlab.layers.linear import Bias, Dropout, Embedding
from attnlab.layers.loss_terms import LossTerms
from attnlab.layers.patches import PatchEmbedding, resize_positions
from attnlab.layers.pooling import ClassAndMean, ClassToken, Distilled, Pool, Pooling, pooled_width
from attnlab.layers.position_wise import LayerNormConfig, RMSNormConfig
from attnlab.layers.specs import Bidirectional, LayerSpec
from attnlab.models.config import Model, SourceConfig, TransformerConfig
from attnlab.models.decoder import layer_stack
from attnlab.models.flops import TokenFlops
from attnlab.sharding import constrain, gather_length


@dataclass(frozen=True)
class ViTConfig(TransformerConfig, SourceConfig):
    """A Vision Transformer; the source of a row is an image, the target of its token the class.

    Attributes:
      image: height, width and channels of the images of the position table, which is interpolated
        for other sizes.
      patch: height and width of a patch. Remaining pixels at the bottom and on the right are
        ignored.
      patch_bias: whether the patch embedding has a bias.
      class_tokens: learned tokens before the patches: 1 is the class token, 2 adds the distillation
        token.
      registers: number of register tokens, which have no position (arXiv 2309.16588, section 2.2).
      mask_token: whether there is a learned token that replaces masked patches.
      embedding_norm: normalise the embeddings (CLIP).
      antialias: interpolate positions with a wider cubic kernel; see `resize_positions`.
      pooling: pooling of the tokens to the vector that is classified.
      classes: number of classes; None means the vocabulary size of the tokenizer, 0 means no head.
    """

    image: tuple[int, int, int] = (224, 224, 3)
    patch: tuple[int, int] = (16, 16)
    patch_bias: bool = True
    class_tokens: int = 1
    registers: int = 0
    mask_token: bool = False
    embedding_norm: bool = False
    antialias: bool = False
    pooling: Pooling = field(default_factory=ClassToken)
    classes: int | None = None
    norm: RMSNormConfig | LayerNormConfig = field(default_factory=LayerNormConfig)
    pattern: tuple[LayerSpec, ...] = (Bidirectional(),)

    def __post_init__(self):
        super().__post_init__()
        if min(*self.image, *self.patch) < 1 or 0 in self.grid:
            raise ValueError(f"image={self.image} must be large enough for at least one patch={self.patch}")
        if not 0 <= self.class_tokens <= 2 or self.registers < 0:
            raise ValueError(
                f"class_tokens={self.class_tokens} must be 0, 1 or 2, and "
                f"registers={self.registers} at least 0"
            )
        needed = {ClassToken: 1, ClassAndMean: 1, Distilled: 2}.get(type(self.pooling), 0)
        if self.class_tokens < needed:
            raise ValueError(f"pooling {type(self.pooling).__name__} needs class_tokens of at least {needed}")
        if isinstance(self.feed_forward, ExpertsConfig):
            raise ValueError("feed_forward of a ViT must be MLP or GatedMLP")

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens before the patches."""
        return self.class_tokens + self.registers

    @property
    def source_shape(self) -> tuple[int, ...]:
        """See `ModelConfig.source_shape`."""
        return self.image

    def check_length(self, length: int) -> None:
        """See `ModelConfig.check_length`."""
        if length != 1:
            raise InputError(f"an image has one class, so data.sequence_length must be 1, not {length}")

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return the config with the number of classes of a tokenizer, unless it is set already.

        Raises:
          InputError: the config's own `classes` is smaller.
        """
        if self.classes and self.classes < vocab_size:
            raise InputError(
                f"model.classes={self.classes} is less than the {vocab_size} words of the tokenizer"
            )
        return replace(self, classes=vocab_size if self.classes is None else self.classes)

    def build(self, vocab_size: int) -> "ViT":
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return ViT(self, self.with_vocab_size(vocab_size).classes or 0)

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`; divides the FLOPs of an image by the row's tokens."""
        classes = vocab_size if self.classes is None else self.classes
        readout = TokenFlops(2.0 * classes * pooled_width(self.pooling, self.width), 0.0)
        return (self.source_flops(self.image[0]) + readout) * (1 / length)

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """See `SourceConfig.encoder_output_shape`."""
        return self.num_prefix_tokens + length // self.patch[0] * self.grid[1], self.width

    def source_flops(self, length: int) -> TokenFlops:
        """See `SourceConfig.source_flops`."""
        tokens, _ = self.encoder_output_shape(length)
        pixels = (tokens - self.num_prefix_tokens) * math.prod(self.patch) * self.image[2]
        return self.layer_flops(tokens) * tokens + TokenFlops(2.0 * self.width * pixels, 0.0)


class ViT(Model):
    """A Vision Transformer: maps images to patch activations, a pooled vector and class logits.

    Attributes:
      config: see `ViTConfig`.
      classes: number of classes V of the head; 0 means no head.
    """

    config: ViTConfig
    classes: int = 0

    def setup(self):
        """Declare the embeddings, the stack of blocks, the final norm, the pooling and the head."""
        c = self.config
        std = c.init.hidden_std(c.width)

        def table(size: int, axis: str = "sequence", width: int = c.width) -> Embedding:
            return Embedding(size, width, (axis, "embed"), c.init.std, c.dtypes)

        self.patches = PatchEmbedding(c.patch, c.width, c.init.std, c.patch_bias, c.dtypes)
        self.position_embedding = table(c.class_tokens + math.prod(c.grid))
        if c.class_tokens:
            self.class_token = table(1)
        if c.class_tokens == 2:
            self.distillation_token = table(1)
        if c.registers:
            self.registers = table(c.registers)
        if c.mask_token:
            self.mask_token = table(1)
        if c.embedding_norm:
            self.embedding_norm = c.norm.build(c.dtypes)
        self.layers = layer_stack(c)
        self.norm = c.norm.build(c.dtypes)
        self.drop = Dropout(c.dropout)
        self.pool = Pool(c.pooling, c.num_prefix_tokens, c.attention, c.feed_forward, c.norm, std, c.dtypes)
        if self.classes:
            distilled = isinstance(c.pooling, Distilled)
            width = c.width if distilled else pooled_width(c.pooling, c.width)
            self.readout = table(self.classes, "vocab", width)
            self.readout_bias = Bias(self.classes, c.dtypes)
            if distilled:
                self.distillation_readout = table(self.classes, "vocab", width)
                self.distillation_readout_bias = Bias(self.classes, c.dtypes)

    def embed(
        self,
        images: Float[Array, "B height width channels"],
        segment_ids: SegmentIds,
        masked: Bool[Array, "B patches"] | None,
        deterministic: bool,
    ) -> EncoderOutput:
        """Return the input of the first layer: class tokens, registers, then patches row by row.

        Raises:
          InputError: the images are smaller than a patch, or have other channels than the config.
        """
        c = self.config
        b, *sides, channels = images.shape
        rows, columns = (side // p for side, p in zip(sides, c.patch, strict=True))
        if not (rows and columns and channels == c.image[2]):
            raise InputError(
                f"images of {sides[0]}x{sides[1]} pixels with {channels} channels do not fit the model, "
                f"whose patches are {c.patch[0]}x{c.patch[1]} with {c.image[2]} channels"
            )
        x = self.patches(images[:, : rows * c.patch[0], : columns * c.patch[1]])
        if c.mask_token:
            hidden = jnp.zeros((b, 1, 1)) if masked is None else masked[..., None]
            hidden = hidden.astype(x.dtype)
            x = hidden * self.mask_token()[None] + (1 - hidden) * x
        positions = resize_positions(
            self.position_embedding(), c.grid, (rows, columns), c.class_tokens, c.antialias
        )
        x = gather_length(x) + positions[None, c.class_tokens :]
        if c.num_prefix_tokens:
            prefix = self._prefix_tokens(positions[: c.class_tokens])
            prefix = jnp.broadcast_to(prefix[None], (b, *prefix.shape))
            x = jnp.concatenate([constrain(prefix, "batch", None, None), x], axis=1)
        x = constrain(x, "batch", "residual", None)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        # A patch has the document of its first row of pixels.
        pixels = documents(segment_ids, images[:, : rows * c.patch[0], 0, 0])
        of_patches = pixels.every(c.patch[0]).repeated(columns)
        of_prefix = documents(None, x[:, : c.num_prefix_tokens, 0])
        return EncoderOutput(self.drop(x, deterministic=deterministic), of_prefix.followed_by(of_patches))

    def _prefix_tokens(self, positions: Float[Array, "class_tokens E"]) -> Float[Array, "prefix E"]:
        c = self.config
        tokens = [self.class_token()] if c.class_tokens else []
        tokens += [self.distillation_token()] if c.class_tokens == 2 else []
        registers = [self.registers()] if c.registers else []
        return jnp.concatenate([*([jnp.concatenate(tokens) + positions] if tokens else []), *registers])

    def encode(
        self,
        source: Float[Array, "B height width channels"],
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
        masked: Bool[Array, "B patches"] | None = None,
        final_norm: bool = True,
    ) -> EncoderOutput:
        """Return the last layer's tokens: `config.num_prefix_tokens` tokens, then the patches.

        Args:
          source: images of any size of at least one patch.
          source_segments: 0 at padding rows of pixels; None means no padding.
          deterministic: see `Model`.
          masked: true at patches that the mask token replaces; None masks no patch.
          final_norm: whether to apply the final norm.
        """
        tokens = self.embed(source, source_segments, masked, deterministic)
        positions = jnp.zeros_like(tokens.segments) + jnp.arange(tokens.segments.shape[1])[None]
        x, _ = self.layers(tokens.hidden, None, SequenceInputs(tokens.documents, positions), deterministic)
        if self.config.placement != "post":  # with "post", the last block already ends with a norm
            # Always call the norm: checkpoints contain its parameters even where they are unused.
            normed = self.norm(x)
            x = normed if final_norm else x
        return replace(tokens, hidden=x)

    def pooled(self, tokens: EncoderOutput) -> Float[Array, "B 1 pooled"]:
        """Return one pooled vector per image from the output of `encode`."""
        return self.pool(tokens)

    def hidden(
        self,
        tokens: Int[Array, "B 1"],
        segment_ids: Int[Array, "B 1"] | None = None,
        positions: Int[Array, "B 1"] | None = None,
        *,
        source: Float[Array, "B height width channels"],
        source_segments: SegmentIds = None,
        deterministic: bool = True,
    ) -> Float[Array, "B patches E"]:
        """Return the activations of `encode` for the images of a batch; its tokens are ignored."""
        del tokens, segment_ids, positions
        return self.encode(source, source_segments, deterministic=deterministic).hidden

    def features(
        self, tokens, segment_ids=None, positions=None, *, source, source_segments=None, deterministic=True
    ) -> Float[Array, "B 1 pooled"]:
        """Return the pooled vector of each image."""
        del tokens, segment_ids, positions
        return self.pooled(self.encode(source, source_segments, deterministic=deterministic))

    def logits_of(self, x: Float[Array, "B 1 pooled"]) -> Float[Array, "B 1 V"]:
        """Return the class logits of pooled vectors, or the vectors if there is no head."""
        return super().logits_of(self._scaled(x)) if self.classes else x

    def loss_terms_of(self, x: Float[Array, "B 1 pooled"], targets: Int[Array, "B 1"]) -> LossTerms:
        """Return the loss terms of pooled vectors.

        Raises:
          InputError: the model has no head.
        """
        if not self.classes:
            raise InputError("a ViT with model.classes=0 has no head to train")
        return super().loss_terms_of(self._scaled(x), targets)

    def _scaled(self, pooled: Float[Array, "B 1 pooled"]) -> Float[Array, "B 1 pooled"]:
        return pooled * jnp.asarray(self.config.init.readout_scale(self.config.width), pooled.dtype)

    def readout_weights(self):
        """See `Model.readout_weights`.

        The two heads of a distilled model are combined into one of twice the width.
        """
        table, bias = self.readout(), self.readout_bias()
        if isinstance(self.config.pooling, Distilled):
            table = jnp.concatenate([table, self.distillation_readout()], axis=1)
            bias = (bias + self.distillation_readout_bias()) / 2
        return table, bias, None, self.config.dtypes.logits
