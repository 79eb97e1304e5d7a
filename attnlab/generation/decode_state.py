"""The state of decoding: the KV cache of all tokens so far, and the logits of the next token."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnlab import sharding
from attnlab.attention.kv_cache import DecoderCache, gather_rows
from attnlab.generation.kv_caches import KVCacheOptions

PREFILL_CHUNK = 1024  # tokens of a prompt per forward pass, over all rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The KV cache of all tokens so far, the logits of the next token, and its position.

    Suppressed tokens have logit -inf: see `GenerationDefaults`.
    """

    cache: DecoderCache
    logits: Float[Array, "B V"]
    positions: Int[Array, " B"]

    def take(self, rows: Int[Array, "G N"]) -> "DecodeState":
        """Return the state of other rows; see `DecoderCache.gather_rows`."""
        logits, positions = (gather_rows(x, rows) for x in (self.logits, self.positions))
        return DecodeState(self.cache.gather_rows(rows), logits, positions)

    def decode(self, model, params, tokens: Int[Array, " B"]) -> "DecodeState":
        """Return the state after one more token of each row."""
        new = tokens[:, None]
        logits, cache = forward(model, params, new, jnp.ones_like(new), self.positions[:, None], self.cache)
        return DecodeState(cache, _last_logits(logits), self.positions + 1)


def forward(
    model, params, tokens, segments, positions, cache: DecoderCache, **source
) -> tuple[Array, DecoderCache]:
    """Return the logits after each token (B, T, V), -inf for suppressed tokens, and the new cache.

    Args:
      model: a module with `init_cache`.
      params: its parameters.
      tokens: token ids.
      segments: 0 at padding.
      positions: position of each token.
      cache: KV cache of the previous tokens.
      **source: for the first tokens, `source` and `source_segments` of `Batch.inputs`, if the model
        has a source.
    """
    logits, cache = model.apply({"params": params}, tokens, segments, positions, cache=cache, **source)
    return suppress(logits, model.config.generation.suppress_tokens), cache


@partial(jax.jit, static_argnums=(0, 1), static_argnames="kv_cache")
def prefill(
    model,
    slots: int,
    params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    kv_cache: KVCacheOptions = KVCacheOptions(),  # noqa: B008 - frozen
    **source,
) -> DecodeState:
    """Return the state after prompts, left-padded where `segments` is 0, with a cache of `slots`.

    A long prompt is processed in chunks, so that no activation covers all of it. A source is
    encoded here, with the whole prompt, and its encoding stays in the cache.
    """
    rows, length = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1, dtype=jnp.int32) - 1, 0)
    cache = kv_cache.apply(model.init_cache(rows, slots), model.config, segments)
    prompt = tokens, segments, positions

    def read(cache: DecoderCache, chunk, **source):
        x, cache = model.apply({"params": params}, *chunk, cache=cache, **source, method="hidden")
        return cache, x[:, -1:]

    num_chunks = 1 if source else math.gcd(length, -(-tokens.size // PREFILL_CHUNK))
    if num_chunks == 1:
        cache, x = read(cache, prompt, **source)
    else:
        chunks = [jnp.moveaxis(x.reshape(rows, num_chunks, -1), 1, 0) for x in prompt]
        cache, x = jax.lax.scan(read, cache, chunks)
        x = x[-1]
    # Only the last token: the logits of a whole long prompt can be larger than the model.
    x = sharding.constrain(x, "batch", None, None)
    logits = model.apply({"params": params}, x, method="logits_of")
    defaults = model.config.generation
    logits = suppress(logits, (*defaults.suppress_tokens, *defaults.begin_suppress_tokens))
    return DecodeState(cache, _last_logits(logits), sharding.constrain(positions[:, -1] + 1, "batch"))


def suppress(logits: Float[Array, "B T V"], tokens: tuple[int, ...]) -> Float[Array, "B T V"]:
    """Set the logits of these tokens to -inf."""
    if not tokens:
        return logits
    return jnp.where(np.isin(np.arange(logits.shape[-1]), tokens)[None, None], -jnp.inf, logits)


def is_eos(tokens: Int[Array, "..."], eos_ids: tuple[int, ...]) -> Bool[Array, "..."]:
    """Return which tokens are one of the end tokens."""
    ended = tokens == eos_ids[0]
    for eos_id in eos_ids[1:]:
        ended |= tokens == eos_id
    return ended


def _last_logits(logits: Float[Array, "B T V"]) -> Float[Array, "B V"]:
    # Constrained explicitly, as positions are: a slice of a single row may lose its sharding.
    return sharding.constrain(logits[:, -1].astype(jnp.float32), "batch", None)
