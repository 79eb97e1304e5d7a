"""Decoder-only language models: one config covers GPT-2, Llama and their variants."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.kv_cache import DecoderCache, KVCache
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.blocks import Cross
from attnlab.layers.linear import Bias, Embedding
from attnlab.layers.readout import LossTerms, logits, token_loss_terms
from attnlab.models.text import TextConfig, TextModel
from attnlab.sharding import constrain, out_sharding


@dataclass(frozen=True)
class DecoderConfig(TextConfig):
    """A decoder-only language model.

    Attributes:
      tied: whether the logits use the embedding table as their weights.
      scale_readout: divide activations by sqrt(E) before the logits (T5).
      readout_bias: add a learned bias to each logit.
      logit_softcap: softcap of the logits; None disables it.
    """

    tied: bool = True
    scale_readout: bool = False
    readout_bias: bool = False
    logit_softcap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be over 0, or none, not {self.logit_softcap}")

    def build(self, vocab_size: int, cross: Cross | None = None) -> "Decoder":
        """Return the module for a tokenizer's vocabulary; raises as `with_vocab_size` does.

        Args:
          vocab_size: number of tokens of the tokenizer.
          cross: kind of cross-attention; None disables it.
        """
        return Decoder(self, self.with_vocab_size(vocab_size).vocab_size or vocab_size, cross)

    def empty_cache(self, batch: int, slots: int, cross: bool = False) -> DecoderCache:
        """Return an empty KV cache for `batch` rows of `slots` tokens.

        With `cross`, the first call with an encoder output also caches its keys and values.
        """
        repeats, rest = divmod(self.depth, len(self.pattern))

        def empty(length: int) -> KVCache:
            return KVCache.empty(batch, length, self.kv_heads, self.head_dim, self.dtypes.compute)

        layer = (empty(slots), empty(0)) if cross else empty(slots)
        spec = out_sharding(None, "batch", None, "kv_heads", None)
        stacked = jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype, out_sharding=spec), layer)
        single = jax.tree.map(lambda x: constrain(x, "batch", None, "kv_heads", None), layer)
        layers = ((stacked,) * len(self.pattern) if repeats else None, (single,) * rest if rest else None)
        spec = out_sharding("batch", None)
        segment_ids = jnp.zeros((batch, slots), jnp.int32, out_sharding=spec)
        context = jnp.zeros((batch, 0), jnp.int32, out_sharding=spec) if cross else None
        return DecoderCache(layers, segment_ids, jnp.zeros((), jnp.int32), context)


class Decoder(TextModel):
    """A decoder-only language model: maps tokens to next-token logits."""

    config: DecoderConfig

    def setup(self):
        """Declare the layers of `TextModel`, and the table and bias of the logits."""
        super().setup()
        c = self.config
        if not c.tied:
            self.readout = Embedding(self.vocab_size, c.width, ("vocab", "embed"), c.init.std, c.dtypes)
        if c.readout_bias:
            self.readout_bias = Bias(self.vocab_size, c.dtypes)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: DecoderCache | None = None,
        deterministic: bool = True,
        memory: EncoderOutput | None = None,
        embedded: Float[Array, "B T E"] | None = None,
        bidirectional_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], DecoderCache | None]:
        """Return activations before the logits, and the updated cache; see `TextModel.forward`."""
        special = {"embedded": embedded, "bidirectional_ids": bidirectional_ids}
        x, cache = self.forward(tokens, segment_ids, positions, cache, deterministic, memory, **special)
        c = self.config
        scale = c.init.readout_scale(c.width) / (c.width**0.5 if c.scale_readout else 1.0)
        return x * jnp.asarray(scale, x.dtype), cache

    def __call__(
        self, tokens, segment_ids=None, positions=None, cache=None, deterministic=True, memory=None
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], DecoderCache | None]:
        """Return next-token logits, with a cache also the updated cache; see `hidden`."""
        x, new_cache = self.hidden(tokens, segment_ids, positions, cache, deterministic, memory)
        out = self.logits_of(x)
        return out if cache is None else (out, new_cache)

    def loss_terms(
        self, tokens, targets, segment_ids=None, positions=None, deterministic=True, memory=None
    ) -> LossTerms:
        """Return each token's loss terms without materialising all logits."""
        x, _ = self.hidden(tokens, segment_ids, positions, None, deterministic, memory)
        return self.loss_terms_of(x, targets)

    def logits_of(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Return the logits of activations from `hidden`."""
        return logits(x, *self._readout())

    def loss_terms_of(self, x: Float[Array, "B T E"], targets: Int[Array, "B T"]) -> LossTerms:
        """Return the loss terms of activations from `hidden`."""
        return token_loss_terms(x, targets, *self._readout())

    def _readout(self):
        """Return the table, bias, softcap and dtype of the logits."""
        c = self.config
        table = self.embedding() if c.tied else self.readout()
        return table, self.readout_bias() if c.readout_bias else None, c.logit_softcap, c.dtypes.logits

    def init_cache(self, batch: int, slots: int) -> DecoderCache:
        """See `DecoderConfig.empty_cache`."""
        return self.config.empty_cache(batch, slots, self.cross is not None)
