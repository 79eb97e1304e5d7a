"""What the config of every family says of its model, and what all Transformers share."""

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
    """Forward operations for one token: a multiply and an add count as two."""

    weights: float
    attention: float

    @property
    def training(self) -> float:
        """Forward and backward, which is twice the forward."""
        return 3 * (self.weights + self.attention)

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, factor: float) -> "TokenFlops":
        return TokenFlops(self.weights * factor, self.attention * factor)


@dataclass(frozen=True)
class GenerationDefaults:
    """Tokens that generated text begins with, ends with and avoids, named as in Hugging Face's libraries.

    Attributes:
      decoder_start_token_id: the token that comes before all that the decoder writes; None is the tokenizer's
        own first token.
      forced_decoder_ids: the first tokens of every text, such as the name of a language.
      suppress_tokens: tokens that are never generated.
      begin_suppress_tokens: tokens that are never generated first, after the forced ones.
      forced_eos: whether a text of the greatest length ends with the end token (`forced_eos_token_id`).
    """

    decoder_start_token_id: int | None = None
    forced_decoder_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos: bool = False


class ModelConfig(ABC):
    """A model, as a frozen dataclass of all that its numbers depend on.

    The module that it builds has `hidden` for activations and `__call__` for logits, of what `Batch.inputs`
    names, and `loss_terms` of the same and the targets, for what a loss needs; all take `deterministic`.
    """

    # A model that generates from a source has a field of this name.
    generation: GenerationDefaults = GenerationDefaults()

    @abstractmethod
    def build(self, vocab_size: int) -> nn.Module:
        """The module of this config for a tokenizer's vocabulary.

        Raises:
          InputError: a vocabulary that the model has no room for.
        """

    @abstractmethod
    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """Operations for each token of full rows of this length."""

    @property
    @abstractmethod
    def uses_dropout(self) -> bool:
        """Whether training drops anything, and so draws random numbers."""

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, so that text can be generated."""
        return False

    @property
    def source_shape(self) -> tuple[int, ...] | None:
        """Shape of what is read beside the tokens, of one row: an image, say; (1,) is text of any length.

        None where there is nothing but tokens.
        """
        return None

    def sharded_dimensions(self) -> Mapping[str, tuple[str, int]]:
        """Fields whose sizes a mesh must be able to cut: field -> (logical axis, size); and of its parts."""
        return {
            name.replace("model.", f"model.{part}.", 1): dimension
            for part, config in self._submodels().items()
            for name, dimension in config.sharded_dimensions().items()
        }

    def check_length(self, length: int) -> None:
        """Checks that the model can read so many tokens.

        Raises:
          InputError: more than it has positions for.
        """
        del length

    def check_source_length(self, length: int) -> None:
        """Checks that the model can read a source of which the first dimension is so long.

        Raises:
          InputError: longer than it can be.
        """
        del length

    def inactive_expert_params(self) -> int:
        """Parameters of the experts that a token does not go to, in all layers of all its parts."""
        return sum(part.inactive_expert_params() for part in self._submodels().values())

    def learning_rate_multipliers(self) -> Mapping[str, float]:
        """Factors of the learning rate, by a regular expression of parameters' names; those of its parts."""
        return {
            f"^{part}/.*{pattern}": factor
            for part, config in self._submodels().items()
            for pattern, factor in config.learning_rate_multipliers().items()
        }

    def with_vocab_size(self, vocab_size: int) -> Self:
        """With the vocabulary that `build` would give the model written into it."""
        del vocab_size
        return self

    def with_dtypes(self, dtypes: Dtypes) -> Self:
        """With other number formats of parameters, computation and logits, in all its parts."""
        config = self._map_submodels(lambda part: part.with_dtypes(dtypes))
        return replace(config, dtypes=dtypes) if hasattr(config, "dtypes") else config  # type: ignore

    def unrolled(self) -> Self:
        """The same model with the parameters of each layer by themselves, not in one array for all layers.

        It takes longer to compile. A step that reads each parameter once, as of text that is generated, is
        faster on a CPU, where XLA would copy a layer's out of the stack.
        """
        return self._map_submodels(lambda part: part.unrolled())

    def canonical(self) -> Self:
        """The same model, defaults written out, and what only training depends on as it is by default.

        Two configs compute the same if these are equal.
        """
        return self._map_submodels(lambda part: part.canonical()).with_dtypes(Dtypes())

    def _submodels(self) -> dict[str, "ModelConfig"]:
        """The models that are fields of this one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in values.items() if isinstance(part, ModelConfig)}

    def _map_submodels(self, change: Callable[["ModelConfig"], "ModelConfig"]) -> Self:
        """With every model that is a field of this one changed."""
        parts = {name: change(part) for name, part in self._submodels().items()}
        return replace(self, **parts)  # type: ignore[type-var]


class SourceConfig(ModelConfig):
    """A model that can also read a source for a decoder: of text, of images, of sound.

    The module that it builds has `encode` besides: of `source`, `source_segments` and `deterministic`, for a
    `EncoderOutput`.
    """

    @property
    def encoder_input_shape(self) -> tuple[int, ...]:
        """Shape of the source of one row, as of `source_shape`: text, where it has no other."""
        return self.source_shape or (1,)

    @abstractmethod
    def encoder_output_shape(self, length: int) -> tuple[int, int]:
        """Length and width of the memory of a source of this length."""

    @abstractmethod
    def source_flops(self, length: int) -> TokenFlops:
        """Operations for a whole source of this length."""


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """A stack of blocks of attention and feed-forward layers.

    Attributes:
      depth: number of layers L.
      width: model width E.
      attention: heads and options of every attention layer.
      feed_forward: `MLPConfig`, `GatedMLPConfig` or `ExpertsConfig`.
      norm: `RMSNormConfig` or `LayerNormConfig`.
      placement: where norms stand; see `BlockConfig`.
      layer_scale: where a learned factor of what each branch adds starts; None is none.
      pattern: kinds of attention, repeated over the layers: five `Sliding` then one `Causal`, say.
      dropout: share of embeddings and residual branches dropped in training.
      init: `Normal` or `MuP`.
      dtypes: number formats of parameters, computation and logits.
      remat: what the backward pass recomputes: nothing, all of a layer, or all but its matrix products.
      scan: compile one period of the pattern and loop over it, instead of compiling every layer.
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
            raise ValueError("depth and width must be at least 1")
        if self.attention.head_dim is None and self.width % self.attention.heads:
            raise ValueError(
                f"width={self.width} is no multiple of attention.heads={self.attention.heads}: change one, "
                "or set attention.head_dim"
            )
        if not self.pattern:
            raise ValueError("pattern must name at least one kind of attention")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and under 1")
        if self.layer_scale is not None and self.layer_scale <= 0:
            raise ValueError("layer_scale must be over 0, or none")

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
        """How many layers look at a memory, in a model whose layers do."""
        return sum(spec.cross_attends for spec in self.layer_specs)

    @property
    def causal(self) -> bool:
        """Whether no layer looks ahead, so that text can be generated."""
        return all(spec.causal for spec in self.pattern)

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return self.dropout > 0 or self.attention.dropout > 0

    def stack(self, positions: Rotary | RelativeBias | NoPositions, cross: Cross | None = None) -> LayerStack:
        """The layers.

        Args:
          positions: how their attention knows of order, where the kind of layer does not say.
          cross: how they look at a memory, if they do.
        """
        return LayerStack(self.block(positions, cross), self.pattern, self.scan, self.remat)

    def block(
        self, positions: Rotary | RelativeBias | NoPositions, cross: Cross | None = None
    ) -> BlockConfig:
        """What the layers share; see `stack`."""
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
        """See `ModelConfig.unrolled`: a pattern longer than the model has no whole period to stack."""
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
        """Operations for each token (Kaplan et al. 2020, arXiv 2001.08361, table 1).

        Attention counts only the pairs that its masks allow, and experts only those that a token goes to.
        """
        readout = TokenFlops(2.0 * vocab_size * self.width, 0.0)
        return self.layer_flops(length) + readout

    def layer_flops(self, length: int) -> TokenFlops:
        """Those of `token_flops` that the layers alone do."""
        heads, d = self.attention.heads, self.head_dim
        projections = self.width * d * (2 * heads + 2 * self.kv_heads)
        weights = self.depth * (projections + self.feed_forward_weights())
        # Pairs for each token, counted once for each kind of layer.
        seen = {spec: length * spec.mask().density(length, length) for spec in set(self.layer_specs)}
        pairs = sum(seen[spec] for spec in self.layer_specs)
        return TokenFlops(2.0 * weights, 4.0 * heads * d * pairs)

    def feed_forward_weights(self) -> int:
        """Weights of a feed-forward layer that a token is multiplied with."""
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
