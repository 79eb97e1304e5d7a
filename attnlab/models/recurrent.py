"""The world before attention: language models whose whole memory of a text is a state of one size."""

from dataclasses import dataclass, field
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import gather_rows
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.dropout import Dropout
from attnlab.layers.linear import Embedding, look_up
from attnlab.layers.parameters import Dtypes
from attnlab.layers.readout import LossTerms, logits, token_loss_terms
from attnlab.layers.recurrent import GRUConfig, LSTMConfig, RecurrentLayerConfig, RecurrentStack, State
from attnlab.models.base import ModelConfig, TokenFlops
from attnlab.models.text import set_vocab_size
from attnlab.sharding import constrain


@dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """A recurrent language model (Mikolov et al. 2010; with an LSTM: Zaremba et al. 2014, arXiv 1409.2329).

    Attributes:
      depth: number of layers L.
      width: of embeddings and states E.
      cell: `LSTMConfig` or `GRUConfig`.
      vocab_size: tokens in the tables; None is as many as the tokenizer has.
      tied: whether the logits read from the embedding table.
      dropout: share of what each layer and the logits read that is dropped in training.
      std: deviation of the initial weights; None is 1 / sqrt(E).
      dtypes: number formats of parameters, computation and logits.
      remat: what the backward pass recomputes: nothing, all of a layer, or all but its matrix products.
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
            raise ValueError("depth and width must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and under 1")
        if self.std is not None and self.std <= 0:
            raise ValueError("std must be over 0, or none")

    def build(self, vocab_size: int) -> nn.Module:
        """The module of this config for a tokenizer's vocabulary; raises as `with_vocab_size` does."""
        return Recurrent(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size)

    def with_vocab_size(self, vocab_size: int) -> Self:
        """With the number of tokens in its tables, for a tokenizer of so many; see `set_vocab_size`."""
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
        """What all layers share."""
        return RecurrentLayerConfig(self.cell, self.width, self.dropout, self.initial_std, self.dtypes)

    @property
    def initial_std(self) -> float:
        """Deviation of the initial weights."""
        return self.std or self.width**-0.5

    def sharded_dimensions(self) -> dict[str, tuple[str, int]]:
        """See `ModelConfig.sharded_dimensions`."""
        return {"model.width": ("embed", self.width)}

    def token_flops(self, vocab_size: int, length: int) -> TokenFlops:
        """Operations for each token: the matrix products, as of other models; no pair is ever looked at."""
        layers = self.depth * 2 * self.cell.gates * self.width**2
        return TokenFlops(2.0 * (layers + vocab_size * self.width), 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentCache:
    """All that a recurrent model keeps of what it has read.

    Attributes:
      layers: states of all layers, (B, L, E) each.
      memory: what a decoder attends to, if it does.
    """

    layers: State
    memory: EncoderOutput | None = None

    def gather_rows(self, rows: Int[Array, "G N"]) -> "States":
        """With other rows; see `DecoderCache.gather_rows`."""
        return jax.tree.map(lambda x: gather_rows(x, rows), self)


class Recurrent(nn.Module):
    """A language model: tokens in, logits of the next token out.

    Attributes:
      config: see `RecurrentConfig`.
      vocab_size: tokens in the tables V.
    """

    config: RecurrentConfig
    vocab_size: int

    def setup(self):
        """Declares the tables and the layers."""
        c = self.config
        self.embedding = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.initial_std, c.dtypes)
        self.drop = Dropout(c.dropout)
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.initial_std, c.dtypes)
        self.declare_layers()

    def declare_layers(self):
        """Declares what is between the tables."""
        c = self.config
        self.layers = RecurrentStack(c.layers, c.depth, False, c.scan, c.remat)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """What the layers read."""
        return constrain(look_up(self.embedding(), tokens), "batch", "sequence", None)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: RecurrentCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T E"], RecurrentCache | None]:
        """Activations before the logits, and the cache with these tokens in it.

        Args:
          tokens: ids.
          segment_ids: 0 for padding, which changes no state; None is none.
          positions: place of each token in its document, which starts from nothing where it is 0; None is
            one document a row, the one in the cache if there is one.
          cache: what was read before.
          deterministic: False drops out, with an rng named "dropout".
        """
        c = self.config
        valid = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        places = jnp.ones_like(tokens) if positions is None else positions
        states = c.layers.empty(tokens.shape[0], c.depth) if cache is None else cache.layers
        valid, is_first = (valid > 0)[..., None], (places == 0)[..., None]
        x, states = self.layers(self.embed(tokens), valid, is_first, states, deterministic)
        return self.drop(x, deterministic=deterministic), None if cache is None else RecurrentCache(states)

    def __call__(
        self, tokens, segment_ids=None, positions=None, cache=None, deterministic=True, **source
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], RecurrentCache | None]:
        """Logits of the token after each; with a cache, also the new cache. Arguments as of `hidden`."""
        x, new_cache = self.hidden(tokens, segment_ids, positions, cache, deterministic, **source)
        out = self.logits_of(x)
        return out if cache is None else (out, new_cache)

    def logits_of(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Logits of what `hidden` gives."""
        return logits(x, *self._readout())

    def loss_terms(
        self, tokens, targets, segment_ids=None, positions=None, deterministic=True, **source
    ) -> LossTerms:
        """What a loss needs of each token's logits, without ever holding all of them."""
        x, _ = self.hidden(tokens, segment_ids, positions, None, deterministic, **source)
        return token_loss_terms(x, targets, *self._readout())

    def _readout(self):
        """Table, bias, cap and dtype of the logits."""
        table = self.embedding() if self.config.tied else self.readout()
        return table, None, None, self.config.dtypes.logits

    def init_cache(self, batch: int, slots: int) -> RecurrentCache:
        """An empty cache: the same for any number of tokens to come."""
        del slots
        return RecurrentCache(self.config.layers.empty(batch, self.config.depth))
