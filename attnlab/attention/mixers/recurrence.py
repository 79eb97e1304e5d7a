"""The recurrence of linear attention and the delta rule, computed token by token or in chunks.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

a_t in (0, 1] are decays and u_t are the values that the mixer adds to the state. Let S_0 be the
state before a chunk, A_t = a_1 ... a_t the product of the decays within it, and A_{j..i} =
A_i / A_j. Then

    o_i = sum_{j <= i} (q_i . A_{j..i} k_j) u_j + S_0^T (A_i q_i),

so that a chunk needs only matrix products and one step of the recurrence (arXiv 2312.06635,
section 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import unify_varying, wide
from attnlab.errors import InputError


class TokenInputs(NamedTuple):
    """Inputs of the recurrence.

    Shapes are (B, T, H, ...) for all tokens, (B, H, ...) for one token and (B, H, C, ...) for a
    chunk of C tokens.
    """

    query: Array
    key: Array
    value: Array
    log_decay: Array
    beta: Array | None
    starts: Array  # 1 where a segment starts, else 0

    @property
    def decay(self) -> Array:
        """Return a_t, or 0 where a segment starts."""
        return jnp.exp(self.log_decay) * (1 - self.starts)


class ChunkDecays(NamedTuple):
    """Products of decays within a chunk; 0 across segments and from a later to an earlier token."""

    between: Float[Array, "B H C C D"]  # A_{j..i} at [i, j]
    since_entry: Float[Array, "B H C D"]
    until_end: Float[Array, "B H C D"]
    total: Float[Array, "B H D"]


def chunk_decays(x: TokenInputs) -> ChunkDecays:
    """Return the products of decays within a chunk.

    A_{j..i} is computed as exp(b_i - b_j), where b is the running sum of the log decays, because
    the quotient A_i / A_j would overflow.
    """
    b, part = jnp.cumsum(x.log_decay, axis=2), jnp.cumsum(x.starts, axis=2)
    earlier = jnp.tril(jnp.ones((b.shape[2],) * 2, bool))[None, None, :, :, None]
    linked = earlier & (part[:, :, :, None] == part[:, :, None, :])
    return ChunkDecays(
        jnp.exp(jnp.where(linked, b[:, :, :, None] - b[:, :, None, :], -jnp.inf)),
        jnp.exp(jnp.where(part == 0, b, -jnp.inf)),
        jnp.exp(jnp.where(part == part[:, :, -1:], b[:, :, -1:] - b, -jnp.inf)),
        jnp.exp(jnp.where(part == 0, b, -jnp.inf)[:, :, -1]),
    )


def decayed_products(left: Array, right: Array, decays: ChunkDecays) -> Float[Array, "B H C C"]:
    """Return left_i . A_{j..i} right_j for j <= i, else 0."""
    if decays.between.shape[-1] == 1:
        return jnp.einsum("bhid,bhjd->bhij", left, right) * decays.between[..., 0]
    return jnp.einsum("bhid,bhjd,bhijd->bhij", left, right, decays.between)


def read_chunk(state: Array, x: TokenInputs, written: Array, decays: ChunkDecays) -> tuple[Array, Array]:
    """Return the state after a chunk and the output; `written` holds the values u_t."""
    out = jnp.einsum("bhij,bhje->bhie", decayed_products(x.query, x.key, decays), written)
    out = out + jnp.einsum("bhid,bhde->bhie", x.query * decays.since_entry, state)
    added = jnp.einsum("bhjd,bhje->bhde", x.key * decays.until_end, written)
    return decays.total[..., None] * state + added, out


def token_inputs(query, key, value, log_decay, beta, segments) -> TokenInputs:
    """Return the inputs in at least float32, with the starts of segments."""
    dtype = wide(query)
    if segments is None:
        starts = jnp.zeros((query.shape[0], query.shape[1]), bool)
    else:
        starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    tokens = TokenInputs(query, key, value, log_decay, beta, starts[:, :, None, None])
    return jax.tree.map(lambda x: x.astype(dtype), tokens)


def scan_tokens(
    token_step: Callable, chunk_step: Callable, tokens: TokenInputs, state: Array | None, chunk: int | None
):
    """Scan over tokens or chunks; return all outputs, (B, T, H, Dv), and the last state.

    Raises:
      InputError: `chunk` is below 1.
    """
    b, t, h, width = tokens.value.shape
    # An outer product of key and value, to get the shape and sharding of the state.
    zero = jnp.zeros_like(tokens.key[:, 0, :, :, None] * tokens.value[:, 0, :, None, :])
    state = zero if state is None else state.astype(zero.dtype)
    tokens, state = unify_varying((tokens, state))
    if chunk is None:
        state, out = jax.lax.scan(token_step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
        return jnp.moveaxis(out, 0, 1), state
    if chunk < 1:
        raise InputError(f"chunk must be None or at least 1, not {chunk}")
    size = min(chunk, t)

    def split(x):
        # Pad the last chunk with zeros: such tokens neither add to the state nor decay it.
        x = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
        return jnp.transpose(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 0, 3, 2, 4))

    state, out = jax.lax.scan(chunk_step, state, jax.tree.map(split, tokens))
    return jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(b, -1, h, width)[:, :t], state


def check_shapes(name: str, query: Array, key: Array, value: Array, log_decay: Array) -> None:
    """Raise InputError unless the shapes match."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}, log_decay {log_decay.shape}"
    if query.ndim != 4 or query.shape != key.shape or key.shape[:3] != value.shape[:3]:
        raise InputError(
            f"{name}: inputs must be (batch, length, heads, width) with equal batch, length and heads, and "
            f"query and key of equal width; got {shapes}"
        )
    if log_decay.shape[:3] != key.shape[:3] or log_decay.shape[3:] not in ((1,), key.shape[3:]):
        raise InputError(f"{name}: log_decay must have one value per head or per key dimension; got {shapes}")
