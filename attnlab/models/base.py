"""Base classes of model configs, and the config that all Transformers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

import flax.linen as nn

from attnlab.layers.attention import AttentionConfig, Causal, LayerSpec, NoPositions, RelativeBias, Rotary
from attnlab.layers.blocks import BlockConfig, Cross, LayerStack, Placement
from attnlab.layers.experts import ExpertsConfig
from attnlab.layers.feed_forward import GatedMLPConfig, MLPConfig
from attnlab.layers.initialization import MuP, Normal
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import Dtypes


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs per token; a multiply-add counts as two.

    Attributes:
      weights: FLOPs of products with parameters.
      attention: FLOPs of attention scores and weighted sums.
    """

    weights: float
    attention: float

    @property
    def training(self) -> float:
        """FLOPs of the forward and the backward pass; the backward pass costs twice the forward."""
        return 3 * (self.weights + self.attention)

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, factor: float) -> "TokenFlops":
        return TokenFlops(self.weights * factor, self.attention * factor)


@dataclass(frozen=True)
class GenerationDefaults:
    """Forced and suppressed tokens of generation, named as in Hugging Face's `GenerationConfig`.

    Attributes:
      decoder_start_token_id: first input token of the decoder; None means the tokenizer's beginning
        token.
      forced_decoder_ids: first tokens of every generated text, such as a language token.
      suppress_tokens: tokens that are never generated.
      begin_suppress_tokens: tokens that are never generated first after the forced ones.
      forced_eos: whether a text of maximum length must end with the end token
        (`forced_eos_token_id`).
    """

    decoder_start_token_id: int | None = None
    forced_decoder_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos: bool = False


class ModelConfig(ABC):
    """Base class of model configs: frozen dataclasses that determine a model's outputs.

    `build` returns a module with three methods that accept `Batch.inputs` and `deterministic`:
    `hidden` (activations), `__call__` (logits) and `loss_terms`, which also takes the targets.
    """

    # Models that generate from a source override this with a field.
    generation: GenerationDefaults = GenerationDefaults()

    @abstractmethod
    def build(self, vocab_size: int) -> nn.Module:
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
        config = self._map_submodels(lambda part: part.with_dtypes(dtypes))
        return replace(config, dtypes=dtypes) if hasattr(config, "dtypes") else config  # type: ignore

    def unrolled(self) -> Self:
        """Return the config of the same model with separate parameters per layer, not stacked ones.

        It takes longer to compile. Decoding steps, which read each parameter once, are faster on a
        CPU, where XLA would copy every layer's parameters out of the stack.
        """
        return self._map_submodels(lambda part: part.unrolled())

    def canonical(self) -> Self:
        """Return the config with defaults made explicit and training-only options reset.

        Two configs compute the same function if their canonical configs are equal.
        """
        return self._map_submodels(lambda part: part.canonical()).with_dtypes(Dtypes())

    def _submodels(self) -> dict[str, "ModelConfig"]:
        """Return the model configs that are fields of this one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in values.items() if isinstance(part, ModelConfig)}

    def _map_submodels(self, change: Callable[["ModelConfig"], "ModelConfig"]) -> Self:
        """Return the config with `change` applied to every model config that is a field."""
        parts = {name: change(part) for name, part in self._submodels().items()}
        return replace(self, **parts)  # type: ignore[type-var]


class SourceConfig(ModelConfig):
    """Base class of models that can encode a source (text, images, audio) for a decoder.

    The module also has a method `encode(source, source_segments, deterministic)`, which returns an
    `EncoderOutput`.
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
      remat: activations recomputed in the backward pass: "none", all of a layer ("full"), or all
        except matrix products ("dots").
      scan: compile one repeat of the pattern and loop over it, instead of compiling every layer.
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
    remat: Literal["none", "full", "dots"] = "none"
    scan: bool = True

    def __post_init__(self):
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"depth={self.depth} and width={self.width} must be at least 1")
        if self.attention.head_dim is None and self.width % self.attention.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of attention.heads={self.attention.heads}: "
                "change one, or set attention.head_dim"
            )
        if not self.pattern:
            raise ValueError("pattern must name at least one kind of attention, such as Causal()")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")
        if self.layer_scale is not None and self.layer_scale <= 0:
            raise ValueError(f"layer_scale must be over 0, or none, not {self.layer_scale}")

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

    def stack(self, positions: Rotary | RelativeBias | NoPositions, cross: Cross | None = None) -> LayerStack:
        """Return the module of all layers.

        Args:
          positions: position embedding of the layers whose spec has none of its own.
          cross: kind of cross-attention; None disables it.
        """
        return LayerStack(self.block(positions, cross), self.pattern, self.scan, self.remat)

    def block(
        self, positions: Rotary | RelativeBias | NoPositions, cross: Cross | None = None
    ) -> BlockConfig:
        """Return the settings that all blocks share; see `stack`."""
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

    def unrolled(self) -> Self:
        """See `ModelConfig.unrolled`.

        A pattern longer than the depth has no whole repeat, so no parameters are stacked.
        """
        return replace(self, pattern=(*self.layer_specs, self.layer_specs[0]))

    def canonical(self) -> Self:
        """See `ModelConfig.canonical`."""
        config = super().canonical()
        attention = replace(config.attention, kv_heads=self.kv_heads, head_dim=self.head_dim, dropout=0.0)
        return replace(
            config,
            attention=attention,
            feed_forward=replace(config.feed_forward, width=self.feed_forward.hidden(self.width)),
            pattern=self.layer_specs,
            layer_scale=self.layer_scale and 1.0,
            dropout=0.0,
            init=replace(config.init, std=1.0),
            remat="none",
            scan=True,
        )

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        feed_forward = {"model.feed_forward.width": ("mlp", self.feed_forward.hidden(self.width))}
        if isinstance(self.feed_forward, ExpertsConfig):
            feed_forward = {"model.feed_forward.experts": ("experts", self.feed_forward.experts)}
        return {
            "model.width": ("embed", self.width),
            "model.attention.heads": ("heads", self.attention.heads),
            "model.attention.kv_heads": ("kv_heads", self.kv_heads),
            **feed_forward,
        }

    def learning_rate_multipliers(self) -> dict[str, float]:
        """See `ModelConfig.learning_rate_multipliers`."""
        factor = self.init.learning_rate(self.width)
        return {r"\b(layers|pool)/.*kernel$": factor} if factor != 1 else {}

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """Return the forward FLOPs per token (Kaplan et al. 2020, arXiv 2001.08361, table 1).

        Attention counts only the pairs that its masks allow, experts only the k that a token uses.
        """
        readout = TokenFlops(2.0 * vocab_size * self.width, 0.0)
        return self.layer_flops(length) + readout

    def layer_flops(self, length: int) -> TokenFlops:
        """Return the part of `token_flops` that the layers contribute, without the logits."""
        heads, d = self.attention.heads, self.head_dim
        projections = self.width * d * (2 * heads + 2 * self.kv_heads)
        weights = self.depth * (projections + self.feed_forward_weights())
        # Average number of keys per query; evaluate each distinct mask once.
        keys = {spec: length * spec.mask().density(length, length) for spec in set(self.layer_specs)}
        pairs = sum(keys[spec] for spec in self.layer_specs)
        return TokenFlops(2.0 * weights, 4.0 * heads * d * pairs)

    def feed_forward_weights(self) -> int:
        """Return the number of feed-forward weights per layer that one token is multiplied with."""
        layer, matrix = self.feed_forward, self.width * self.feed_forward.hidden(self.width)
        if isinstance(layer, ExpertsConfig):
            return layer.experts * self.width + 3 * layer.top_k * matrix
        return (3 if isinstance(layer, GatedMLPConfig) else 2) * matrix

    def inactive_expert_params(self) -> int:
        """See `ModelConfig.inactive_expert_params`."""
        layer, hidden = self.feed_forward, self.feed_forward.hidden(self.width)
        if not isinstance(layer, ExpertsConfig):
            return 0
        biases = 2 * hidden + self.width if layer.bias else 0
        return self.depth * (layer.experts - layer.top_k) * (3 * self.width * hidden + biases)
