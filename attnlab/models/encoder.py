"""Bidirectional text encoders with heads for masked tokens, classification and pooling."""

from dataclasses import dataclass, field
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError
from attnlab.layers.attention import EncoderOutput, SegmentIds, documents
from attnlab.layers.blocks import LayerStack
from attnlab.layers.linear import Linear, look_up
from attnlab.layers.loss_terms import LossTerms
from attnlab.layers.specs import Bidirectional, LayerSpec
from attnlab.models.config import SourceConfig, TextConfig
from attnlab.models.decoder import TextModel, layer_stack
from attnlab.models.flops import TokenFlops
from attnlab.models.heads import ClassifierConfig, Head, HeadConfig, MaskedLMConfig, PooledConfig


@dataclass(frozen=True)
class EncoderConfig(TextConfig, SourceConfig):
    """A text encoder: BERT, ALBERT, ModernBERT and their variants.

    Attributes:
      head: `MaskedLMConfig`, `ClassifierConfig` or `PooledConfig`.
      token_types: number of learned token-type embeddings, such as 2 for first and second sentence.
      embedding_width: width W of the embedding tables, which a linear map projects to the model
        width (ALBERT, arXiv 1909.11942, section 3.1); None means the model width.
      num_param_groups: number of parameter sets that the layers share; each is used by the same
        number of consecutive repeats of the pattern (ALBERT, section 3.1). None shares no
        parameters.
      skip_first_attention_norm: omit the norm before the first layer's attention, because the norm
        of the embeddings directly precedes it (ModernBERT, arXiv 2412.13663, section 2.1).
    """

    pattern: tuple[LayerSpec, ...] = (Bidirectional(),)
    head: HeadConfig = field(default_factory=MaskedLMConfig)
    token_types: int = 0
    embedding_width: int | None = None
    num_param_groups: int | None = None
    skip_first_attention_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.token_types < 0 or (self.embedding_width or 1) < 1:
            raise ValueError("token_types must be at least 0, and embedding_width at least 1 or none")
        groups = self.num_param_groups
        if groups is not None and (groups < 1 or self.depth % (groups * len(self.pattern))):
            raise ValueError(
                f"depth={self.depth} must be a multiple of num_param_groups={groups} times the length "
                f"{len(self.pattern)} of the pattern"
            )
        if groups and self.unrolled:
            raise ValueError("unrolled=true needs num_param_groups=none")
        if self.skip_first_attention_norm and (groups or self.placement not in ("pre", "both")):
            raise ValueError(
                "skip_first_attention_norm needs placement=pre or both, and num_param_groups=none"
            )
        if self.embedding_width and isinstance(self.head, MaskedLMConfig) and self.head.dense is None:
            raise ValueError("with embedding_width, head.dense must not be none: it maps back to that width")

    @property
    def table_width(self) -> int:
        """Width of the tables of tokens, token types and positions W."""
        return self.embedding_width or self.width

    @property
    def head_width(self) -> int:
        """Width of the head's features, from which the logits are computed."""
        return self.table_width if isinstance(self.head, MaskedLMConfig) else self.width

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return super().uses_dropout or (isinstance(self.head, ClassifierConfig) and self.head.dropout > 0)

    def with_unrolled_layers(self) -> Self:
        """See `ModelConfig.with_unrolled_layers`; keeps models with shared parameters."""
        return self if self.num_param_groups else super().with_unrolled_layers()

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        return {**super().sharded_dimensions(), "model.embedding_width": ("embed", self.table_width)}

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `TransformerConfig.token_flops`; pooling is not counted."""
        weights = self.head.outputs(vocab_size) * self.head_width
        weights += self.width * (self.embedding_width or 0)
        weights += self.width * self.head_width if self.head.dense else 0
        return self.layer_flops(length) + TokenFlops(2.0 * weights, 0.0)

    def inactive_expert_params(self) -> int:
        """See `ModelConfig.inactive_expert_params`."""
        own = self.num_param_groups * len(self.pattern) if self.num_param_groups else self.depth
        return super().inactive_expert_params() * own // self.depth

    def build(self, vocab_size: int) -> "Encoder":
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return Encoder(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)

    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """See `SourceConfig.encoder_output_shape`."""
        return length, self.width

    def source_flops(self, length: int) -> TokenFlops:
        """See `SourceConfig.source_flops`."""
        return self.layer_flops(length) * length


class Encoder(TextModel):
    """A text encoder with a head: maps tokens to activations, and to logits or pooled vectors."""

    config: EncoderConfig

    def setup(self):
        """Declare the layers of `TextModel`, the token types, the projection and the head."""
        super().setup()
        c = self.config
        if c.token_types:
            self.type_embedding = self._table(c.token_types, "sequence")
        if c.embedding_width:
            inputs, std = (c.embedding_width,), c.init.hidden_std(c.width)
            self.projection = Linear(inputs, (c.width,), ("norm", "embed"), std, True, c.dtypes)
        outputs = c.head.outputs(self.vocab_size)
        # Each kind of head has its own name, so that one table of parameter names covers all of
        # them.
        self.head = Head(c.head, outputs, c.head_width, c.norm, c.init, c.dtypes, name=c.head.name)

    def stack(self, positions: Any) -> LayerStack:
        """Return the module of all layers."""
        c = self.config
        return layer_stack(
            c,
            positions,
            num_param_groups=c.num_param_groups,
            skip_first_attention_norm=c.skip_first_attention_norm,
        )

    def embed(self, tokens, positions, **inputs) -> Float[Array, "B T E"]:
        """Return the input of the first layer; see `TextModel.embed`."""
        x = super().embed(tokens, positions, **inputs)
        return self.projection(x) if self.config.embedding_width else x

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        token_types: Int[Array, "B T"] | None = None,
        table: Float[Array, "V E"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Return activations after the last layer; see `Model` and `TextModel.forward`.

        `token_types` None means type 0 for every token.
        """
        added = None
        if self.config.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            added = look_up(self.type_embedding(), types)
        x, _ = self.forward(
            tokens, segment_ids, positions, deterministic=deterministic, table=table, added=added
        )
        return x

    def encode(
        self,
        source: Int[Array, "B S"],
        source_segments: SegmentIds = None,
        *,
        deterministic: bool = True,
        table: Float[Array, "V E"] | None = None,
    ) -> EncoderOutput:
        """Return the encoder output of a text; `source_segments` is 0 at padding."""
        rows = documents(source_segments, source)
        positions = jnp.maximum(jnp.cumsum(rows.ids > 0, axis=1, dtype=jnp.int32) - 1, 0)
        x = self.hidden(source, source_segments, positions, deterministic=deterministic, table=table)
        return EncoderOutput(x, rows)

    def features(
        self, tokens, segment_ids=None, positions=None, *, deterministic=True, **inputs
    ) -> Float[Array, "B T W"]:
        """Return the head's features; those of a document are repeated at all of its tokens."""
        x = self.hidden(tokens, segment_ids, positions, deterministic=deterministic, **inputs)
        return self.head(x, documents(segment_ids, tokens).ids, deterministic)

    def logits_of(self, x: Float[Array, "B T W"]) -> Float[Array, "B T outputs"]:
        """Return the head's logits, or pooled vectors, of `features`."""
        return x if isinstance(self.config.head, PooledConfig) else super().logits_of(x)

    def loss_terms_of(self, x: Float[Array, "B T W"], targets: Int[Array, "B T"]) -> LossTerms:
        """Return each token's loss terms; a document's terms are repeated at all of its tokens.

        Raises:
          InputError: the head has no logits.
        """
        if isinstance(self.config.head, PooledConfig):
            raise InputError("model.head=Pooled has no logits, so it has no loss: use MaskedLM or Classifier")
        return super().loss_terms_of(x, targets)

    def readout_weights(self):
        """See `Model.readout_weights`."""
        return self.head.table(self.embedding), self.head.bias(), None, self.config.dtypes.logits
