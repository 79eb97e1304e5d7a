"""The recurrence that linear attention and the delta rule share, token by token and in chunks.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

with decays a_t in (0, 1] and the values u_t that a mixer writes. With A_t = a_1 ... a_t inside a chunk that
S_0 enters, and A_{j..i} = A_i / A_j,

    o_i = sum_{j <= i} (q_i . A_{j..i} k_j) u_j + S_0^T (A_i q_i),

which is matrix products, and one step of the recurrence per chunk (arXiv 2312.06635, section 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.errors import InputError


class TokenInputs(NamedTuple):
    """What the recurrence reads: of all tokens (B, T, H, ...), of one (B, H, ...), a chunk (B, H, C, ...)."""

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
    """Products of decays in a chunk; 0 between tokens of two segments and from a token to one before it."""

    between: Float[Array, "B H C C D"]  # from the second token to the first
    since_entry: Float[Array, "B H C D"]
    until_end: Float[Array, "B H C D"]
    total: Float[Array, "B H D"]


def chunk_decays(x: TokenInputs) -> ChunkDecays:
    """A_{j..i} as exp(b_i - b_j), b the running sums of logarithms; a quotient of products would overflow."""
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
    """left_i . A_{j..i} right_j for j <= i, else 0."""
    if decays.between.shape[-1] == 1:
        return jnp.einsum("bhid,bhjd->bhij", left, right) * decays.between[..., 0]
    return jnp.einsum("bhid,bhjd,bhijd->bhij", left, right, decays.between)


def read_chunk(state: Array, x: TokenInputs, written: Array, decays: ChunkDecays) -> tuple[Array, Array]:
    """The state after a chunk, and its output, where u_t are the rows of `written`."""
    out = jnp.einsum("bhij,bhje->bhie", decayed_products(x.query, x.key, decays), written)
    out = out + jnp.einsum("bhid,bhde->bhie", x.query * decays.since_entry, state)
    added = jnp.einsum("bhjd,bhje->bhde", x.key * decays.until_end, written)
    return decays.total[..., None] * state + added, out


def token_inputs(query, key, value, log_decay, beta, segments) -> TokenInputs:
    """Return the inputs in float32 at least, with the starts of segments."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if segments is None:
        starts = jnp.zeros((query.shape[0], query.shape[1]), bool)
    else:
        starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    tokens = TokenInputs(query, key, value, log_decay, beta, starts[:, :, None, None])
    return jax.tree.map(lambda x: x.astype(dtype), tokens)


def scan_tokens(
    token_step: Callable, chunk_step: Callable, tokens: TokenInputs, state: Array | None, chunk: int | None
):
    """The outputs of all tokens, (B, T, H, Dv), and the last state, by a scan over tokens or over chunks."""
    b, t, h, width = tokens.value.shape
    # The shape of what a token writes, and its layout over devices.
    zero = jnp.zeros_like(tokens.key[:, 0, :, :, None] * tokens.value[:, 0, :, None, :])
    state = zero if state is None else state.astype(zero.dtype)
    if chunk is None:
        state, out = jax.lax.scan(token_step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
        return jnp.moveaxis(out, 0, 1), state
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 or None, not {chunk}")
    size = min(chunk, t)

    def split(x):
        # Tokens of zeros fill the last chunk: they write nothing, and decay nothing.
        x = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
        return jnp.transpose(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 0, 3, 2, 4))

    state, out = jax.lax.scan(chunk_step, state, jax.tree.map(split, tokens))
    return jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(b, -1, h, width)[:, :t], state


def check_shapes(name: str, query: Array, key: Array, value: Array, log_decay: Array) -> None:
    """Raise InputError unless the shapes fit."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}, log_decay {log_decay.shape}"
    if query.ndim != 4 or query.shape != key.shape or key.shape[:3] != value.shape[:3]:
        raise InputError(
            f"{name} takes (batch, length, heads, width) arrays of one length and heads; got {shapes}"
        )
    if log_decay.shape[:3] != key.shape[:3] or log_decay.shape[3:] not in ((1,), key.shape[3:]):
        raise InputError(f"{name}: a decay is of each head, or of each dimension of its key; got {shapes}")
