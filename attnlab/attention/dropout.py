"""Dropout of attention weights: which pairs are kept, as a function of their indices.

A backend evaluates the function for the pairs that it computes, and again in its backward pass. So
no backend stores a mask, and all backends and all meshes drop the same pairs.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from attnlab.attention.pairwise import PairIndices, PairwiseFn, pytree, static

__all__ = ["AttentionDropout", "HashDropout", "MaskDropout"]


@pytree
class AttentionDropout(PairwiseFn):
    """Base class: drops attention weights and divides the others by 1 - rate.

    Attributes:
      rate: fraction of the weights to drop.
    """

    rate: float = static()

    def keep(self, at: PairIndices) -> Bool[Array, "#B #H #T #S"]:
        """Return which pairs are kept."""
        raise NotImplementedError

    def __call__(self, weights: Array, at: PairIndices) -> Array:
        """Return the weights (B, H, T, S) of the pairs `at` after dropout."""
        return jnp.where(self.keep(at), weights / (1 - self.rate), 0)


@pytree
class HashDropout(AttentionDropout):
    """Keeps a pair if a hash of its indices is at least rate * 2^32.

    Attributes:
      words: random numbers that select the hash function.
      broadcast: whether all batch rows and heads drop the same pairs.
    """

    words: UInt32[Array, " 3"]
    broadcast: bool = static()

    @staticmethod
    def from_key(rate: float, key: Array, broadcast: bool) -> "HashDropout":
        """Return the dropout of a random key."""
        return HashDropout(float(rate), jax.random.bits(key, (3,), jnp.uint32), bool(broadcast))

    def keep(self, at):
        """See `AttentionDropout.keep`."""
        if self.broadcast:
            at = at._replace(b=jnp.zeros((1, 1, 1, 1), jnp.uint32), h=jnp.zeros((1, 1, 1, 1), jnp.uint32))
        return hash_pairs(self.words, at) >= jnp.uint32(round(self.rate * 2**32))


@pytree
class MaskDropout(AttentionDropout):
    """Keeps the pairs of a boolean array."""

    mask: Bool[Array, "#B #H #T #S"]

    dims = {"mask": ("batch", "heads", "queries", "keys")}

    def keep(self, at):
        """See `AttentionDropout.keep`."""
        return self.mask


def hash_pairs(words: UInt32[Array, " 3"], at: PairIndices) -> UInt32[Array, "#B #H #T #S"]:
    """Return 32 random bits for each pair, a counter-based generator over its four indices.

    Two words are hashed with the row (b, h, q) and one with the key index, so each pair costs only
    one round of `_mix`. The second word of the row enters in the middle of that round: two rows
    with the same bits need a collision in 64 bits.
    """
    b, h, q, kv = (jnp.asarray(x).astype(jnp.uint32) for x in at)
    first, second = (reduce(lambda x, index: _mix(x ^ index), (b, h, q), word) for word in words[:2])
    return _mix(first ^ _mix(words[2] ^ kv), second)


def _mix(x: Array, second: Array | int = 0) -> Array:
    """Return the hash of 32 bits by multiplications and xor-shifts.

    Wellons 2018, "Prospecting for Hash Functions" (nullprogram.com/blog/2018/07/31), with the
    constants 21f0aaad, d35a2d97 of its 2022 update: flipping an input bit flips each output bit
    with probability 1/2, up to 0.1%. `second` is mixed in between the two multiplications.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15) ^ second) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
