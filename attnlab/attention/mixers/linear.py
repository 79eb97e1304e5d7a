"""Attention without softmax, whose past is one matrix S of each head: memory and cost linear in the length.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

with decays a_t in (0, 1] and u_t = v_t, or in the delta rule what v_t differs by from what S holds for k_t.
All are causal. Each function goes token by token as written (`chunk=None`), or chunk by chunk: with
A_t = a_1 ... a_t inside a chunk that S_0 enters, and A_{j..i} = A_i / A_j,

    o_i = sum_{j <= i} (q_i . A_{j..i} k_j) u_j + S_0^T (A_i q_i),

which is matrix products, and a step of the recurrence for each chunk alone (arXiv 2312.06635, section 4).
Queries and keys are taken as they are: scaling, norms and gates are the caller's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.errors import InputError


def linear_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H Dv"],
    *,
    feature: Callable[[Array], Array] = lambda x: jax.nn.elu(x) + 1,
    state: Float[Array, "B H Df Dv+1"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    chunk: int | None = 64,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Df Dv+1"]]:
    """o_t = sum_{j <= t} (f(q_t) . f(k_j)) v_j / sum_{j <= t} f(q_t) . f(k_j), for a positive feature map f,
    by default elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, section 3).

    The state is that of `gated_linear_attention` for values with a further column of ones, the denominator.
    """
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    out, state = gated_linear_attention(
        feature(query),
        feature(key),
        jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1),
        jnp.zeros_like(query[..., :1]),
        state=state,
        segments=segments,
        chunk=chunk,
    )
    return (out[..., :-1] / out[..., -1:]).astype(value.dtype), state


def retention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H Dv"],
    *,
    state: Float[Array, "B H D Dv"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    chunk: int | None = 64,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H D Dv"]]:
    """o_t = sum_{j <= t} g^(t-j) (q_t . k_j) v_j with a decay g = 1 - 2^(-5-h) of head h (RetNet, Sun et al.
    2023, arXiv 2307.08621, section 2).

    Positions are the caller's, by `rotary`.
    """
    decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(query.shape[2]))))
    log_decay = jnp.zeros_like(query[..., :1], decay.dtype) + decay[None, None, :, None]
    return gated_linear_attention(query, key, value, log_decay, state=state, segments=segments, chunk=chunk)


def gated_linear_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H Dv"],
    log_decay: Float[Array, "B T H #D"],
    *,
    state: Float[Array, "B H D Dv"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    chunk: int | None = 64,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H D Dv"]]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t (Yang et al. 2023, arXiv 2312.06635, section 4).

    Args:
      query: (B, T, H, D).
      key: (B, T, H, D).
      value: (B, T, H, Dv).
      log_decay: log a_t <= 0, for each dimension of the key or one for all of them, (B, T, H, 1). With one
        for each, memory has a factor D within a chunk, whose size is then better about 16.
      state: S before the first token, for going on with a sequence; None is 0.
      segments: where a number differs from that before it, S starts from 0.
      chunk: tokens in a chunk; None goes token by token.

    Returns:
      The output in the value's dtype, and S after the last token, in float32 at least.

    Raises:
      InputError: shapes that do not fit.
    """
    _check("gated_linear_attention", query, key, value, log_decay)

    def token(state, x):
        state = x.decay[..., None] * state + x.key[..., None] * x.value[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", x.query, state)

    def whole(state, x):
        return _read(state, x, x.value, _decays(x))

    tokens = _tokens(query, key, value, log_decay, None, segments)
    out, state = _run(token, whole, tokens, state, chunk)
    return out.astype(value.dtype), state


def gated_delta_rule(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H Dv"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    *,
    state: Float[Array, "B H D Dv"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    chunk: int | None = 64,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H D Dv"]]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t: of what S holds for k_t, the
    share b_t gives way to v_t (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464, equation 10).

    In the form above u_t = b_t (v_t - a_t S_{t-1}^T k_t), which in a chunk is a triangular system: (I + L) U
    = b (V - A K S_0), L_ij = b_i (k_i . A_{j..i} k_j) for j < i (section 3.3). It stays bounded for keys of
    length 1 and b_t in (0, 2); decays of 1 are DeltaNet (arXiv 2406.06484).

    Args:
      query: (B, T, H, D).
      key: (B, T, H, D).
      value: (B, T, H, Dv).
      log_decay: log a_t <= 0.
      beta: b_t, how much is replaced.
      state: S before the first token, for going on with a sequence; None is 0.
      segments: where a number differs from that before it, S starts from 0.
      chunk: tokens in a chunk; None goes token by token.

    Returns:
      The output in the value's dtype, and S after the last token, in float32 at least.

    Raises:
      InputError: shapes that do not fit.
    """
    _check("gated_delta_rule", query, key, value, log_decay[..., None])

    def token(state, x):
        state = x.decay[..., None] * state
        change = x.beta * (x.value - jnp.einsum("bhd,bhde->bhe", x.key, state))
        state = state + x.key[..., None] * change[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", x.query, state)

    def whole(state, x):
        decays = _decays(x)
        lower = x.beta * jnp.tril(_products(x.key, x.key, decays), -1)
        held = jnp.einsum("bhid,bhde->bhie", x.key * decays.since_entry, state)
        change = jax.scipy.linalg.solve_triangular(
            lower, x.beta * (x.value - held), lower=True, unit_diagonal=True
        )
        return _read(state, x, change, decays)

    tokens = _tokens(query, key, value, log_decay[..., None], beta[..., None], segments)
    out, state = _run(token, whole, tokens, state, chunk)
    return out.astype(value.dtype), state


class _Tokens(NamedTuple):
    """What the recurrence reads: of all tokens (B, T, H, ...), of one (B, H, ...), a chunk (B, H, C, ...)."""

    query: Array
    key: Array
    value: Array
    log_decay: Array
    beta: Array | None
    starts: Array  # 1 where a segment starts, else 0

    @property
    def decay(self) -> Array:
        return jnp.exp(self.log_decay) * (1 - self.starts)


class _Decays(NamedTuple):
    """Products of decays in a chunk; 0 between tokens of two segments and from a token to one before it."""

    between: Float[Array, "B H C C D"]  # from the second token to the first
    since_entry: Float[Array, "B H C D"]
    until_end: Float[Array, "B H C D"]
    total: Float[Array, "B H D"]


def _decays(x: _Tokens) -> _Decays:
    """A_{j..i} as exp(b_i - b_j), b the running sums of logarithms; a quotient of products would overflow."""
    b, part = jnp.cumsum(x.log_decay, axis=2), jnp.cumsum(x.starts, axis=2)
    earlier = jnp.tril(jnp.ones((b.shape[2],) * 2, bool))[None, None, :, :, None]
    linked = earlier & (part[:, :, :, None] == part[:, :, None, :])
    return _Decays(
        jnp.exp(jnp.where(linked, b[:, :, :, None] - b[:, :, None, :], -jnp.inf)),
        jnp.exp(jnp.where(part == 0, b, -jnp.inf)),
        jnp.exp(jnp.where(part == part[:, :, -1:], b[:, :, -1:] - b, -jnp.inf)),
        jnp.exp(jnp.where(part == 0, b, -jnp.inf)[:, :, -1]),
    )


def _products(left: Array, right: Array, decays: _Decays) -> Float[Array, "B H C C"]:
    """left_i . A_{j..i} right_j for j <= i, else 0."""
    if decays.between.shape[-1] == 1:
        return jnp.einsum("bhid,bhjd->bhij", left, right) * decays.between[..., 0]
    return jnp.einsum("bhid,bhjd,bhijd->bhij", left, right, decays.between)


def _read(state: Array, x: _Tokens, written: Array, decays: _Decays) -> tuple[Array, Array]:
    """The state after a chunk, and its output, where u_t are the rows of `written`."""
    out = jnp.einsum("bhij,bhje->bhie", _products(x.query, x.key, decays), written)
    out = out + jnp.einsum("bhid,bhde->bhie", x.query * decays.since_entry, state)
    added = jnp.einsum("bhjd,bhje->bhde", x.key * decays.until_end, written)
    return decays.total[..., None] * state + added, out


def _tokens(query, key, value, log_decay, beta, segments) -> _Tokens:
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if segments is None:
        starts = jnp.zeros((query.shape[0], query.shape[1]), bool)
    else:
        starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    tokens = _Tokens(query, key, value, log_decay, beta, starts[:, :, None, None])
    return jax.tree.map(lambda x: x.astype(dtype), tokens)


def _run(token: Callable, whole: Callable, tokens: _Tokens, state: Array | None, chunk: int | None):
    """The outputs of all tokens, (B, T, H, Dv), and the last state, by a scan over tokens or over chunks."""
    b, t, h, width = tokens.value.shape
    # The shape of what a token writes, and its layout over devices.
    zero = jnp.zeros_like(tokens.key[:, 0, :, :, None] * tokens.value[:, 0, :, None, :])
    state = zero if state is None else state.astype(zero.dtype)
    if chunk is None:
        state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
        return jnp.moveaxis(out, 0, 1), state
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 or None, not {chunk}")
    size = min(chunk, t)

    def split(x):
        # Tokens of zeros fill the last chunk: they write nothing, and decay nothing.
        x = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
        return jnp.transpose(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 0, 3, 2, 4))

    state, out = jax.lax.scan(whole, state, jax.tree.map(split, tokens))
    return jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(b, -1, h, width)[:, :t], state


def _check(name: str, query: Array, key: Array, value: Array, log_decay: Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}, log_decay {log_decay.shape}"
    if query.ndim != 4 or query.shape != key.shape or key.shape[:3] != value.shape[:3]:
        raise InputError(
            f"{name} takes (batch, length, heads, width) arrays of one length and heads; got {shapes}"
        )
    if log_decay.shape[:3] != key.shape[:3] or log_decay.shape[3:] not in ((1,), key.shape[3:]):
        raise InputError(f"{name}: a decay is of each head, or of each dimension of its key; got {shapes}")
