"""What was read before anything is generated: the cache after the prompts, and the next token's logits."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.attention.cache import Cache, take_rows

READ = 1024  # tokens read at a time, over all rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Texts read so far: the cache of their tokens, logits of the next token, and its position.

    Logits of tokens that the model never writes, or never first, are -inf: see `Seq2SeqConfig.never`.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    positions: Int[Array, " B"]

    def take(self, rows: Int[Array, "G N"]) -> "Prefix":
        """With other rows; see `Cache.take`."""
        logits, positions = (take_rows(x, rows) for x in (self.logits, self.positions))
        return Prefix(self.cache.take(rows), logits, positions)

    def read(self, model, params, tokens: Int[Array, " B"]) -> "Prefix":
        """With one more token of each row."""
        new = tokens[:, None]
        logits, cache = forward(model, params, new, jnp.ones_like(new), self.positions[:, None], self.cache)
        return Prefix(cache, _last(logits), self.positions + 1)


def forward(model, params, tokens, segments, positions, cache: Cache, **source) -> tuple[Array, Cache]:
    """Logits after each of these tokens (B, T, V), and the cache with them; -inf of what is never written.

    Args:
      model: with `init_cache`.
      params: its parameters.
      tokens: ids.
      segments: 0 where they are padding.
      positions: of each token.
      cache: of what was read before.
      **source: at the first tokens, what `Batch.inputs` has of a source, if the model reads one.
    """
    logits, cache = model.apply({"params": params}, tokens, segments, positions, cache, **source)
    return without(logits, model.config.never), cache


@partial(jax.jit, static_argnums=(0, 1))
def prefill(
    model, slots: int, params, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], **source
) -> Prefix:
    """Reads prompts, padded on the left where `segments` is 0, into a new cache of so many slots.

    Many tokens are read a piece after the other, so that no activation is of all of them. What is made of a
    source is kept in the cache: it is read here, with the whole prompt, and never again.
    """
    rows, length = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache, whole = model.init_cache(rows, slots), (tokens, segments, positions)

    def read(cache: Cache, piece, **source):
        x, cache = model.apply({"params": params}, *piece, cache, **source, method="hidden")
        return cache, x[:, -1:]

    count = 1 if source else math.gcd(length, -(-tokens.size // READ))
    if count == 1:
        cache, x = read(cache, whole, **source)
    else:
        pieces = [jnp.moveaxis(x.reshape(rows, count, -1), 1, 0) for x in whole]
        cache, x = jax.lax.scan(read, cache, pieces)
        x = x[-1]
    # Of the last token alone: the logits of all of a long prompt can be larger than the model.
    x = sharding.constrain(x, "batch", None, None)
    logits = model.apply({"params": params}, x, method="logits_of")
    logits = without(logits, (*model.config.never, *model.config.never_first))
    return Prefix(cache, _last(logits), sharding.constrain(positions[:, -1] + 1, "batch"))


def without(logits: Float[Array, "B T V"], tokens: tuple[int, ...]) -> Float[Array, "B T V"]:
    """Logits that are -inf of these tokens."""
    if not tokens:
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[-1]), tokens)[None, None], -jnp.inf, logits)


def _last(logits: Float[Array, "B T V"]) -> Float[Array, "B V"]:
    # Laid out by word, as positions are, for a slice of a single row may lose its layout.
    return sharding.constrain(logits[:, -1].astype(jnp.float32), "batch", None)
