"""Base classes of model configs, and the config that all Transformers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import flax.linen as nn
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError
from attnlab.layers.attention import AttentionConfig
from attnlab.layers.blocks import BlockConfig, Cross, Placement
from attnlab.layers.experts import ExpertsConfig
from attnlab.layers.linear import Dtypes, MuP, Normal, logits
from attnlab.layers.loss_terms import LossTerms, token_loss_terms
from attnlab.layers.position_wise import GatedMLPConfig, LayerNormConfig, MLPConfig, RMSNormConfig
from attnlab.layers.remat import Remat
from attnlab.layers.specs import (
    Causal,
    LayerSpec,
    Learned,
    NoPositions,
    RelativeBias,
    Rotary,
    Sinusoidal,
)
from attnlab.models.flops import TokenFlops, attention_flops, feed_forward_weights, inactive_expert_params
from attnlab.models.generation_defaults import GenerationDefaults


class Model(nn.Module):
    """Base module of models: one signature of `hidden`, `__call__` and `loss_terms`.

    They take the arguments of this list, in this order. All but the first three are given by
    keyword, and a model without a use for an argument does not have it. Arguments of one family
    only, such as the `token_types` of encoders, follow by keyword; see its `hidden`.

    Args:
      tokens: token ids, (B, T).
      segment_ids: document id of each token in a packed row, 0 at padding, (B, T). If each row
        holds one document with its padding at the end, its number of tokens, (B,). None means one
        document per row without padding.
      positions: position of each token in its document, (B, T); None counts from 0, or from the
        number of tokens in the cache.
      source: source of each row: token ids (B, S), or images or audio features (B, S, ...). None
        means that the cache holds its encoding.
      source_segments: the same for the source, (B, S) or (B,).
      cache: state of the model after the preceding tokens, from `init_cache`. `hidden` and
        `__call__` then return a pair: the result and the updated cache.
      deterministic: disable dropout; otherwise an rng named "dropout" is needed.
    """

    def hidden(self, *args: Any, **inputs: Any) -> Any:
        """Return the activations of the last layer."""
        raise NotImplementedError

    def features(self, *args: Any, **inputs: Any) -> Any:
        """Return the input of the logits: the activations, or those of a head after them."""
        return self.hidden(*args, **inputs)

    def logits_of(self, x: Any) -> Float[Array, "B T V"]:
        """Return the logits of `features`."""
        return logits(x, *self.readout_weights())

    def loss_terms_of(self, x: Any, targets: Int[Array, "B T"]) -> LossTerms:
        """Return the loss terms of `features` without materialising all logits."""
        return token_loss_terms(x, targets, *self.readout_weights())

    def readout_weights(self) -> tuple[Array, Array | None, float | None, str]:
        """Return the table as it is stored, and bias, softcap and dtype of the logits."""
        raise NotImplementedError

    def __call__(self, tokens, segment_ids=None, positions=None, **inputs):
        """Return the logits at each token."""
        x = self.features(tokens, segment_ids, positions, **inputs)
        if inputs.get("cache") is None:
            return self.logits_of(x)
        x, cache = x
        return self.logits_of(x), cache

    def loss_terms(self, tokens, targets, segment_ids=None, positions=None, **inputs) -> LossTerms:
        """Return each token's loss terms; has no cache."""
        return self.loss_terms_of(self.features(tokens, segment_ids, positions, **inputs), targets)


class ModelConfig(ABC):
    """Base class of model configs: frozen dataclasses that determine a model's outputs.

    `build` returns a `Model`.
    """

    # Transformer decoders and models that generate from a source override this with a field.
    generation: GenerationDefaults = GenerationDefaults()

    @abstractmethod
    def build(self, vocab_size: int) -> Model:
        """Return the Flax module of this config for a tokenizer with `vocab_size` tokens.

        Raises:
          InputError: the vocabulary is larger than the config allows.
        """

    @abstractmethod
    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """Return the forward FLOPs per token of full rows of this length."""

    @property
    @abstractmethod
    def uses_dropout(self) -> bool:
        """Whether training uses dropout and needs an rng named "dropout"."""

    @property
    def causal(self) -> bool:
        """Whether no token attends to a later one, as generation requires."""
        return False

    @property
    def source_shape(self) -> tuple[int, ...] | None:
        """Shape of one row's source, such as an image; (1,) means text of any length.

        None means that the model only takes tokens.
        """
        return None

    def sharded_dimensions(self) -> Mapping[str, tuple[str, int]]:
        """Return {field: (logical axis, size)} of every dimension that a mesh may shard.

        Includes the models that are fields of this one.
        """
        return {
            name.replace("model.", f"model.{part}.", 1): dimension
            for part, config in self._submodels().items()
            for name, dimension in config.sharded_dimensions().items()
        }

    def check_length(self, length: int) -> None:
        """Check that the model accepts rows of `length` tokens.

        Raises:
          InputError: `length` exceeds the number of positions.
        """
        del length

    def check_source_length(self, length: int) -> None:
        """Check that the model accepts a source whose first dimension is `length`.

        Raises:
          InputError: the source is too long.
        """
        del length

    def inactive_expert_params(self) -> int:
        """Return the number of expert parameters that one token does not use, over all layers."""
        return sum(part.inactive_expert_params() for part in self._submodels().values())

    def learning_rate_multipliers(self) -> Mapping[str, float]:
        """Return {regular expression of parameter names: learning-rate multiplier}.

        Includes the models that are fields of this one.
        """
        return {
            f"^{part}/.*{pattern}": factor
            for part, config in self._submodels().items()
            for pattern, factor in config.learning_rate_multipliers().items()
        }

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return the config with the vocabulary size that `build(vocab_size)` would use."""
        del vocab_size
        return self

    def with_dtypes(self, dtypes: Dtypes) -> Self:
        """Return the config with other dtypes, in this model and the models that are its fields."""
        config = self.map_submodels(lambda part: part.with_dtypes(dtypes))
        return replace(config, dtypes=dtypes) if hasattr(config, "dtypes") else config  # type: ignore

    def with_unrolled_layers(self) -> Self:
        """Return the config with `unrolled` set, also in the models that are its fields."""
        return self.map_submodels(lambda part: part.with_unrolled_layers())

    def map_submodels(self, change: Callable[["ModelConfig"], "ModelConfig"]) -> Self:
        """Return the config with `change` applied to every model config that is a field."""
        parts = {name: change(part) for name, part in self._submodels().items()}
        return replace(self, **parts)  # type: ignore[type-var]

    def _submodels(self) -> dict[str, "ModelConfig"]:
        """Return the model configs that are fields of this one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in values.items() if isinstance(part, ModelConfig)}


class SourceConfig(ModelConfig):
    """Base class of models that can encode a source (text, images, audio) for a decoder.

    The module also has a method `encode(source, source_segments=None, *, deterministic=True)`,
    which returns an `EncoderOutput`.
    """

    @property
    def encoder_input_shape(self) -> tuple[int, ...]:
        """Shape of one row of `encode`'s source: `source_shape`, or (1,) for text."""
        return self.source_shape or (1,)

    @abstractmethod
    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """Return the length and the width of the encoder output for a source of this length."""

    @abstractmethod
    def source_flops(self, length: int) -> TokenFlops:
        """Return the forward FLOPs of encoding one source of this length."""


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """A stack of Transformer blocks.

    Attributes:
      depth: number of layers L.
      width: model width E.
      attention: heads and options of every attention layer.
      feed_forward: `MLPConfig`, `GatedMLPConfig` or `ExpertsConfig`.
      norm: `RMSNormConfig` or `LayerNormConfig`.
      placement: placement of norms: "pre", "post", "both" or "branch"; see `BlockConfig`.
      layer_scale: initial value of a learned scale of each branch; None disables it.
      pattern: attention patterns repeated over the layers, such as five `Sliding` and one `Causal`.
      dropout: dropout rate of embeddings and residual branches in training.
      init: `Normal` or `MuP`.
      dtypes: dtypes of parameters, computation and logits.
      remat: activations recomputed in the backward pass: "none", all of a layer ("full"), all
        except matrix products ("dots"), or all except those named by `Save`.
      scan: compile one repeat of the pattern and loop over it, instead of compiling every layer.
      unrolled: keep the parameters of each layer apart, instead of stacking those of the repeats
        of the pattern. It takes longer to compile. Decoding steps, which read each parameter once,
        are faster on a CPU, where XLA would copy every layer's parameters out of the stack.
    """

    depth: int = 6
    width: int = 256
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: MLPConfig | GatedMLPConfig | ExpertsConfig = field(default_factory=MLPConfig)
    norm: RMSNormConfig | LayerNormConfig = field(default_factory=RMSNormConfig)
    placement: Placement = "pre"
    layer_scale: float | None = None
    pattern: tuple[LayerSpec, ...] = (Causal(),)
    dropout: float = 0.0
    init: Normal | MuP = field(default_factory=Normal)
    dtypes: Dtypes = field(default_factory=Dtypes)
    remat: Remat = "none"
    scan: bool = True
    unrolled: bool = False

    def __post_init__(self):
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"depth={self.depth} and width={self.width} must be at least 1")
        if self.attention.head_dim is None and self.width % self.attention.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of attention.heads={self.attention.heads}: "
                "change one, or set attention.head_dim"
            )
        if isinstance(self.feed_forward, ExpertsConfig) and self.dtypes.products != "compute":
            raise ValueError(
                f"dtypes.products={self.dtypes.products} is not supported by feed_forward=Experts"
            )
        if not self.pattern:
            raise ValueError("pattern must name at least one kind of attention, such as Causal()")
        for index, spec in enumerate(self.pattern):
            self._check_rotary(f"pattern.{index}.positions", spec.positions)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")
        if self.layer_scale is not None and self.layer_scale <= 0:
            raise ValueError(f"layer_scale must be over 0, or none, not {self.layer_scale}")

    def _check_rotary(self, field: str, positions: object) -> None:
        if isinstance(positions, Rotary) and self.head_dim * positions.fraction < 2:
            raise ValueError(
                f"{field}=Rotary must rotate at least 2 components of a head, but "
                f"head_dim={self.head_dim} times fraction={positions.fraction} is less"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head D."""
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.attention.kv_heads or self.attention.heads

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The spec of each layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def num_stacked_repeats(self) -> int:
        """Number of repeats of the pattern with stacked parameters; other layers follow."""
        return 0 if self.unrolled else self.depth // len(self.pattern)

    @property
    def num_cross_attention_layers(self) -> int:
        """Number of layers that cross-attend, in a model with cross-attention."""
        return sum(spec.cross_attends for spec in self.layer_specs)

    @property
    def causal(self) -> bool:
        """Whether no token attends to a later one, as generation requires."""
        return all(spec.causal for spec in self.pattern)

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return self.dropout > 0 or self.attention.dropout > 0

    def block(
        self, positions: Rotary | RelativeBias | NoPositions, cross: Cross | None = None
    ) -> BlockConfig:
        """Return the settings that all blocks share; see `decoder.layer_stack`."""
        return BlockConfig(
            width=self.width,
            depth=self.depth,
            attention=self.attention,
            feed_forward=self.feed_forward,
            norm=self.norm,
            placement=self.placement,
            layer_scale=self.layer_scale,
            positions=positions,
            cross=cross,
            dropout=self.dropout,
            init=self.init,
            dtypes=self.dtypes,
        )

    def with_unrolled_layers(self) -> Self:
        """See `ModelConfig.with_unrolled_layers`."""
        return replace(self, unrolled=True)

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        feed_forward = {"model.feed_forward.width": ("mlp", self.feed_forward.hidden(self.width))}
        if isinstance(self.feed_forward, ExpertsConfig):
            feed_forward = {
                "model.feed_forward.experts": ("experts", self.feed_forward.experts),
                "model.feed_forward.width": ("expert_mlp", self.feed_forward.hidden(self.width)),
            }
        return {
            "model.width": ("embed", self.width),
            "model.attention.heads": ("heads", self.attention.heads),
            # A single key head is on every device.
            **({"model.attention.kv_heads": ("kv_heads", self.kv_heads)} if self.kv_heads > 1 else {}),
            **feed_forward,
        }

    def learning_rate_multipliers(self) -> dict[str, float]:
        """See `ModelConfig.learning_rate_multipliers`."""
        factor = self.init.learning_rate(self.width)
        return {r"\b(layers|pool)/.*kernel$": factor} if factor != 1 else {}

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """See `ModelConfig.token_flops`."""
        readout = TokenFlops(2.0 * vocab_size * self.width, 0.0)
        return self.layer_flops(length) + readout

    def layer_flops(self, length: int) -> TokenFlops:
        """Return the part of `token_flops` that the layers contribute, without the logits."""
        sizes = self.width, self.attention.heads, self.kv_heads, self.head_dim
        feed_forward = self.depth * feed_forward_weights(self.feed_forward, self.width)
        return attention_flops(self.layer_specs, *sizes, length) + TokenFlops(2.0 * feed_forward, 0.0)

    def inactive_expert_params(self) -> int:
        """See `ModelConfig.inactive_expert_params`."""
        return self.depth * inactive_expert_params(self.feed_forward, self.width)


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A Transformer over text tokens.

    Attributes:
      positions: `Rotary`, `Learned`, `Sinusoidal`, `RelativeBias` or `NoPositions`.
      vocab_size: number of tokens in the embedding table; None means that of the tokenizer.
      scale_embedding: multiply embeddings by sqrt(E) (Vaswani et al. 2017, section 3.4).
      embedding_norm: normalise the sum of the embeddings.
    """

    positions: Rotary | Learned | Sinusoidal | RelativeBias | NoPositions = field(default_factory=Rotary)
    vocab_size: int | None = None
    scale_embedding: bool = False
    embedding_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._check_rotary("positions", self.positions)

    def check_length(self, length: int) -> None:
        """Check that the model has positions for `length` tokens.

        Raises:
          InputError: the learned position table is shorter.
        """
        if isinstance(self.positions, Learned) and length > self.positions.length - self.positions.offset:
            rows, offset = self.positions.length, self.positions.offset
            minus = f" minus offset={offset}" if offset else ""
            raise InputError(f"length {length} exceeds positions.length={rows}{minus} learned positions")

    @property
    def table_width(self) -> int:
        """Width of the tables of tokens and positions."""
        return self.width

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return the config with `vocab_size` set; see `set_vocab_size`.

        Raises:
          InputError: the config's own `vocab_size` is smaller.
        """
        return set_vocab_size(self, vocab_size)


def set_vocab_size(config: Any, vocab_size: int) -> Any:
    """Return the config with `vocab_size` set to that of a tokenizer, unless it is set already.

    Raises:
      InputError: the config's own `vocab_size` is smaller.
    """
    if config.vocab_size is not None and config.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size={config.vocab_size} is less than the {vocab_size} tokens of the tokenizer"
        )
    return replace(config, vocab_size=config.vocab_size or vocab_size)
