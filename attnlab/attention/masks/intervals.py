"""Masks in which the allowed keys of each query are one or a few contiguous intervals."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.arrays import check_array, check_at_least, check_index
from attnlab.attention.masks.base import CountingMask, Index, Mask
from attnlab.attention.pairwise import PairIndices, pytree, static

UNBOUNDED = 2**30  # further than any key


class IntervalMask(CountingMask):
    """Base class of masks made of key intervals; subclasses implement `kv_intervals`.

    Masks with an `offset` place query i at key index i + offset.
    """

    def kv_intervals(self, at: PairIndices) -> list[tuple[Index, Index]]:
        """Return the disjoint intervals of allowed keys of each query, as (first, end) pairs."""
        raise NotImplementedError

    def kv_bounds(self, grid):
        """See `Mask.kv_bounds`."""
        count, _ = grid.num_blocks
        padded = self.pad_to(queries=count * grid.block_q)
        last = grid.num_queries - 1
        q = grid.offset[2] + np.minimum(np.arange(count * grid.block_q), last)[None, None, :, None]
        at = PairIndices(*(np.zeros((1, 1, 1, 1), int) for _ in range(2)), q, np.zeros((1, 1, 1, 1), int))
        firsts, ends = [], []
        for first, end in padded.kv_intervals(at):
            bounds = np.broadcast_arrays(*(np.asarray(x) for x in (first, end)), q)[:2]
            first, end = (np.moveaxis(x, 2, 0).reshape(count, -1) for x in bounds)
            empty = first >= end
            firsts.append(np.where(empty, UNBOUNDED, first).min(1))
            ends.append(np.where(empty, -UNBOUNDED, end).max(1))
        return np.min(firsts, axis=0), np.max(ends, axis=0)

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        allowed = False
        for first, end in self.kv_intervals(at):
            allowed |= (at.kv >= first) & (at.kv < end)
        return allowed

    def count_before(self, at):
        """See `CountingMask.count_before`."""
        return sum(jnp.clip(at.kv, first, end) for first, end in self.kv_intervals(at))


@pytree
class PrefixMask(IntervalMask):
    """Prefix LM: causal, plus a prefix of keys that every query attends to.

    (T5, arXiv 1910.10683, section 3.2.1.) prefix(2):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   x x x .
    query 3   x x x x

    Attributes:
      length: number of prefix keys, an int or one per batch row, (B,).
      offset: key index of the first query.
    """

    length: Index
    offset: Index = 0

    dims = {"length": ("batch",)}

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [(0, jnp.maximum(broadcast_rows(self.length), at.q + self.offset + 1))]


@pytree
class KeyLengthMask(IntervalMask):
    """Padding mask: only the first `keys` keys of each batch row may be attended to.

    key_lengths(jnp.array([3])):

        keys  0 1 2 3
    query 0   x x x .
    query 1   x x x .

    Attributes:
      keys: number of keys that are not padding, an int or (B,).
      queries: number of queries that are not padding, an int or (B,). Later queries attend to no
        key. None means that all queries are valid.
    """

    keys: Index
    queries: Index | None = None

    dims = {"keys": ("batch",), "queries": ("batch",)}

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        if self.queries is None:
            return [(0, broadcast_rows(self.keys))]
        return [(0, jnp.where(at.q < broadcast_rows(self.queries), broadcast_rows(self.keys), 0))]


@pytree
class ChunkedMask(IntervalMask):
    """Causal within chunks of `size` tokens (the local layers of Llama 4).

    chunked(2):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x . .
    query 2   . . x .
    query 3   . . x x
    """

    size: int = static()
    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        position = at.q + self.offset
        return [(position // self.size * self.size, position + 1)]


@pytree
class BlockCausalMask(IntervalMask):
    """Causal between blocks of `size` tokens and bidirectional within each block.

    (BD3-LM, arXiv 2503.09573, section 3.1.) block_causal(2):

        keys  0 1 2 3
    query 0   x x . .
    query 1   x x . .
    query 2   x x x x
    query 3   x x x x
    """

    size: int = static()
    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        return [(0, ((at.q + self.offset) // self.size + 1) * self.size)]


@pytree
class BlockDiffusionMask(IntervalMask):
    """Training mask of block diffusion: `length` noised tokens followed by the same tokens clean.

    A noised block attends to itself and to the clean blocks before it; clean blocks attend to each
    other block-causally (BD3-LM, arXiv 2503.09573, section 3.2). block_diffusion(length=4, size=2):

        keys  0 1 2 3 4 5 6 7
    query 0   x x . . . . . .
    query 1   x x . . . . . .
    query 2   . . x x x x . .
    query 3   . . x x x x . .
    query 4   . . . . x x . .
    query 5   . . . . x x . .
    query 6   . . . . x x x x
    query 7   . . . . x x x x
    """

    length: int = static()
    size: int = static()

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        clean = at.q >= self.length
        first = at.q % self.length // self.size * self.size
        end = jnp.minimum(first + self.size, self.length)
        noised = jnp.where(clean, 0, first), jnp.where(clean, 0, end)
        return [noised, (self.length, self.length + jnp.where(clean, end, first))]


@pytree
class SinksAndWindowMask(IntervalMask):
    """Causal attention to the first `sinks` keys and to a window of `left` keys before the query.

    (StreamingLLM, arXiv 2309.17453, section 3.2.) sinks_and_window(sinks=1, left=1):

        keys  0 1 2 3 4
    query 0   x . . . .
    query 1   x x . . .
    query 2   x x x . .
    query 3   x . x x .
    query 4   x . . x x
    """

    sinks: int = static()
    left: int = static()
    offset: Index = 0

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        position = at.q + self.offset
        return [
            (0, jnp.minimum(self.sinks, position + 1)),
            (jnp.maximum(position - self.left, self.sinks), position + 1),
        ]


@pytree
class IslandMask(IntervalMask):
    """Causal, plus bidirectional attention within islands, such as the patches of an image.

    islands(jnp.array([[0, 1, 1, 0]])):

        keys  0 1 2 3
    query 0   x . . .
    query 1   x x x .
    query 2   x x x .
    query 3   x x x x

    Attributes:
      ends: end (exclusive) of the island of each token, (B, S); 0 for tokens outside islands.
      offset: key index of the first query.
    """

    ends: Int[Array, "B S"]
    offset: Index = 0

    dims = {"ends": ("batch", None)}

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        position = at.q + self.offset
        return [(0, jnp.maximum(position + 1, _gather(self.ends, position)))]


@pytree
class SharedPrefixMask(IntervalMask):
    """Several continuations of one prefix: each attends to the prefix and, causally, to itself.

    shared_prefix(jnp.array([[0, 0, 1, 1, 2, 2]])):

        keys  0 1 2 3 4 5
    query 0   x . . . . .
    query 1   x x . . . .
    query 2   x x x . . .
    query 3   x x x x . .
    query 4   x x . . x .
    query 5   x x . . x x

    Attributes:
      prefix: length of the prefix, (B,).
      starts: first index of the continuation of each token, (B, S); 0 in the prefix.
      offset: key index of the first query.
    """

    prefix: Int[Array, " B"]
    starts: Int[Array, "B S"]
    offset: Index = 0

    dims = {"prefix": ("batch",), "starts": ("batch", None)}

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        position = at.q + self.offset
        start = _gather(self.starts, position)
        return [(0, jnp.where(start > 0, broadcast_rows(self.prefix), 0)), (start, position + 1)]


@pytree
class MediaMask(IntervalMask):
    """Each text token attends to the last image marked at or before it, and to no other image.

    The keys are the images in order, `tokens` keys each (Flamingo, arXiv 2204.14198, section 2.3).
    media(jnp.array([[False, True, False, True]]), tokens=2):

        keys  0 1 2 3
    query 0   . . . .
    query 1   x x . .
    query 2   x x . .
    query 3   . . x x

    Attributes:
      images: number of images marked up to and including each token, (B, T).
      tokens: keys per image.
    """

    images: Int[Array, "B T"]
    tokens: int = static()

    dims = {"images": ("batch", "queries")}

    def kv_intervals(self, at):
        """See `IntervalMask.kv_intervals`."""
        end = jnp.asarray(self.images)[:, None, :, None] * self.tokens
        return [(jnp.maximum(end - self.tokens, 0), end)]


def broadcast_rows(x: Index):
    """Return a value per batch row, (B,), in a shape that broadcasts to (B, H, T, S)."""
    return x if jnp.ndim(x) == 0 else jnp.reshape(x, (-1, 1, 1, 1))


def _gather(x: Array, index: Array):
    """Return the values of x, (B, S), at an index of shape (1 or B, 1, T, 1)."""
    return jnp.take_along_axis(jnp.asarray(x)[:, None, :, None], jnp.maximum(index, 0), axis=2, mode="clip")


def split_blocks(x: Array, size: int):
    """Split the last axis into blocks of `size`; the last block is padded with the last value."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], mode="edge")
    return x.reshape(*x.shape[:-1], -1, size)


def window_bounds(position, left: int | None, right: int | None):
    """Return the first key of a window around `position`, and its end (exclusive)."""
    before = UNBOUNDED if left is None else left
    after = UNBOUNDED if right is None else right + 1
    return position - before, position + after


def as_row_values(x: Index) -> Index:
    """Return a Python int unchanged, so that it stays static, and an array in shape (B,)."""
    return x if isinstance(x, int) else jnp.reshape(x, (-1,))


def prefix(length: Index | Int[Array, " B"], offset: Index = 0) -> Mask:
    """Return the prefix-LM mask: causal, plus the first `length` keys for every query.

    Raises:
      InputError: an argument is not an integer, or `length` is negative.
    """
    check_index("prefix", 1, 0, length=length)
    check_index("prefix", offset=offset)
    return PrefixMask(as_row_values(length), offset)


def key_lengths(keys: Index | Int[Array, " B"], queries: Index | Int[Array, " B"] | None = None) -> Mask:
    """Return the padding mask: only the first `keys` keys of each batch row are allowed.

    Raises:
      InputError: a length is negative or not an integer; a boolean padding mask is itself a mask.
    """
    check_index("key_lengths", 1, 0, keys=keys, **({} if queries is None else {"queries": queries}))
    rows = as_row_values(keys)
    if queries is None or queries is keys:  # `queries is keys` stays visible
        return KeyLengthMask(rows, None if queries is None else rows)
    return KeyLengthMask(rows, as_row_values(queries))


def chunked(size: int, offset: Index = 0) -> Mask:
    """Return the mask that is causal within chunks of `size` tokens.

    Raises:
      InputError: `size` is below 1.
    """
    check_at_least(1, "chunked: ", size=size)
    check_index("chunked", offset=offset)
    return ChunkedMask(size, offset)


def block_causal(size: int, offset: Index = 0) -> Mask:
    """Return the mask that allows a query's own block of `size` tokens and every earlier block.

    Raises:
      InputError: `size` is below 1.
    """
    check_at_least(1, "block_causal: ", size=size)
    check_index("block_causal", offset=offset)
    return BlockCausalMask(size, offset)


def block_diffusion(length: int, size: int) -> Mask:
    """Return the block-diffusion training mask: `length` noised tokens, then the same tokens clean.

    Raises:
      InputError: `length` or `size` is below 1.
    """
    check_at_least(1, "block_diffusion: ", length=length, size=size)
    return BlockDiffusionMask(length, size)


def sinks_and_window(sinks: int, left: int, offset: Index = 0) -> Mask:
    """Return the causal mask of the first `sinks` keys and `left` keys before the query.

    Raises:
      InputError: `sinks` or `left` is negative.
    """
    check_at_least(0, "sinks_and_window: ", sinks=sinks, left=left)
    check_index("sinks_and_window", offset=offset)
    return SinksAndWindowMask(sinks, left, offset)


def islands(ids: Int[Array, "B S"], offset: Index = 0) -> Mask:
    """Return the causal mask that also allows all pairs within each island.

    An island is a run of consecutive tokens with the same id; tokens with id 0 are outside islands.

    Raises:
      InputError: `ids` is not an integer array (B, S), or `offset` not an integer.
    """
    check_array("islands: ids", ids, "integer", 2)
    check_index("islands", offset=offset)
    with jax.ensure_compile_time_eval():  # keeps a static mask static under a trace
        return IslandMask(_run_ends(jnp.asarray(ids)), offset)


def _run_ends(ids: Array) -> Array:
    """Return the end (exclusive) of each token's run of equal ids; 0 for tokens with id 0."""
    last = jnp.concatenate([ids[:, 1:] != ids[:, :-1], jnp.ones_like(ids[:, :1], bool)], axis=1)
    after = jnp.where(last, jnp.arange(1, ids.shape[1] + 1)[None, :], UNBOUNDED)
    return jnp.where(ids == 0, 0, jax.lax.cummin(after, axis=1, reverse=True))


def shared_prefix(ids: Int[Array, "B S"], offset: Index = 0) -> Mask:
    """Return the mask for several continuations of one prefix, packed into one row.

    Each continuation attends to the prefix and, causally, to itself. `ids` is 0 in the prefix and
    the number of the continuation, from 1, after it.

    Raises:
      InputError: `ids` is not an integer array (B, S), or `offset` not an integer.
    """
    check_array("shared_prefix: ids", ids, "integer", 2)
    check_index("shared_prefix", offset=offset)
    with jax.ensure_compile_time_eval():
        ids = jnp.asarray(ids)
        return SharedPrefixMask((ids == 0).sum(1), _run_starts(ids), offset)


def _run_starts(ids: Array) -> Array:
    """Return the first index of each token's run of equal ids."""
    first = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(first, jnp.arange(ids.shape[1])[None, :], 0), axis=1)


def media(markers: Bool[Array, "B T"], tokens: int) -> Mask:
    """Return the mask of cross-attention from each text token to the last image before it.

    Args:
      markers: True where the text contains an image marker, (B, T).
      tokens: keys per image.

    Raises:
      InputError: `markers` is not a boolean array (B, T), or `tokens` is below 1.
    """
    check_array("media: markers", markers, "boolean", 2)
    check_at_least(1, "media: ", tokens=tokens)
    with jax.ensure_compile_time_eval():
        return MediaMask(jnp.cumsum(jnp.asarray(markers), axis=1, dtype=jnp.int32), tokens)
