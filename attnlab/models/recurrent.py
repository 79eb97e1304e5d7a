"""Recurrent language models with LSTM or GRU cells."""

from dataclasses import dataclass, field
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import gather_rows
from attnlab.layers.attention import EncoderOutput, SegmentIds, documents
from attnlab.layers.linear import Dropout, Dtypes, Embedding, look_up
from attnlab.layers.recurrent import GRUConfig, LSTMConfig, RecurrentLayerConfig, RecurrentStack, State
from attnlab.models.config import Model, ModelConfig, set_vocab_size
from attnlab.models.flops import TokenFlops
from attnlab.sharding import constrain


@dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """A recurrent language model.

    Mikolov et al. 2010; with LSTM cells Zaremba et al. 2014, arXiv 1409.2329.

    Attributes:
      depth: number of layers L.
      width: width E of embeddings and states.
      cell: `LSTMConfig` or `GRUConfig`.
      vocab_size: number of tokens in the embedding table; None means that of the tokenizer.
      tied: whether the logits use the embedding table as their weights.
      dropout: dropout rate of the inputs of each layer and of the logits in training.
      std: standard deviation of the initial weights; None means 1 / sqrt(E).
      dtypes: dtypes of parameters, computation and logits.
      remat: activations recomputed in the backward pass: "none", all of a layer ("full"), or all
        except matrix products ("dots").
      scan: compile one layer and loop over it, instead of compiling every layer.
    """

    depth: int = 2
    width: int = 256
    cell: LSTMConfig | GRUConfig = field(default_factory=LSTMConfig)
    vocab_size: int | None = None
    tied: bool = True
    dropout: float = 0.0
    std: float | None = None
    dtypes: Dtypes = field(default_factory=Dtypes)
    remat: Literal["none", "full", "dots"] = "none"
    scan: bool = True

    def __post_init__(self):
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"depth={self.depth} and width={self.width} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and under 1, not {self.dropout}")
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std must be over 0, or none, not {self.std}")

    def build(self, vocab_size: int) -> Model:
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return Recurrent(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)

    def with_vocab_size(self, vocab_size: int) -> Self:
        """See `set_vocab_size`."""
        return set_vocab_size(self, vocab_size)

    @property
    def causal(self) -> bool:
        """See `ModelConfig.causal`."""
        return True

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig.uses_dropout`."""
        return self.dropout > 0

    @property
    def layers(self) -> RecurrentLayerConfig:
        """Settings that all layers share."""
        return RecurrentLayerConfig(self.cell, self.width, self.dropout, self.initial_std, self.dtypes)

    @property
    def initial_std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.std or self.width**-0.5

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        return {"model.width": ("embed", self.width)}

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """Return the forward FLOPs per token: those of the matrix products, none of attention."""
        layers = self.depth * 2 * self.cell.gates * self.width**2
        return TokenFlops(2.0 * (layers + vocab_size * self.width), 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentCache:
    """Decoding state of a recurrent model, the counterpart of a KV cache.

    Attributes:
      layers: states of all layers, (B, L, E) each.
      memory: encoder output that the decoder attends to; None in a language model.
    """

    layers: State
    memory: EncoderOutput | None = None

    def gather_rows(self, rows: Int[Array, "G N"]) -> "RecurrentCache":
        """Return the cache with its rows gathered by index; see `DecoderCache.gather_rows`."""
        return jax.tree.map(lambda x: gather_rows(x, rows), self)


class Recurrent(Model):
    """A recurrent language model: maps tokens to next-token logits.

    Attributes:
      config: see `RecurrentConfig`.
      vocab_size: number of tokens V in the embedding table.
    """

    config: RecurrentConfig
    vocab_size: int

    def setup(self):
        """Declare the embedding tables and the layers."""
        c = self.config
        self.embedding = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.initial_std, c.dtypes)
        self.drop = Dropout(c.dropout)
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.initial_std, c.dtypes)
        self.declare_layers()

    def declare_layers(self):
        """Declare the recurrent layers; subclasses override it."""
        c = self.config
        self.layers = RecurrentStack(c.layers, c.depth, False, c.scan, c.remat)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Return the token embeddings."""
        return constrain(look_up(self.embedding(), tokens), "batch", None, None)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: SegmentIds = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        cache: RecurrentCache | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], RecurrentCache]:
        """Return activations before the logits; see `Model`.

        Args:
          tokens: token ids.
          segment_ids: 0 at padding, which does not change the state; None means no padding.
          positions: position of each token in its document; the state is reset where it is 0. None
            means that each row is one document, which continues the one in the cache.
          cache: states after the preceding tokens; None starts from zero states.
          deterministic: see `Model`.
        """
        c = self.config
        places = jnp.ones_like(tokens) if positions is None else positions
        states = c.layers.empty(tokens.shape[0], c.depth) if cache is None else cache.layers
        valid, is_first = (documents(segment_ids, tokens).ids > 0)[..., None], (places == 0)[..., None]
        x, states = self.layers(self.embed(tokens), valid, is_first, states, deterministic)
        x = self.drop(x, deterministic=deterministic)
        return x if cache is None else (x, RecurrentCache(states))

    def readout_weights(self):
        """See `Model.readout_weights`."""
        table = (self.embedding if self.config.tied else self.readout)(gather=False)
        return table, None, None, self.config.dtypes.logits

    def init_cache(self, batch: int, slots: int) -> RecurrentCache:
        """Return an initial cache; its size does not depend on the number of tokens `slots`."""
        del slots
        return RecurrentCache(self.config.layers.empty(batch, self.config.depth))
