"""Linear attention: causal attention without softmax, whose past is one matrix S of each head.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Memory and cost are linear in the length. Each function goes token by token as written (`chunk=None`), or
chunk by chunk, as `recurrence` describes. Queries and keys are taken as they are: scaling, norms and gates
are the caller's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.mixers.recurrence import (
    check_shapes,
    chunk_decays,
    read_chunk,
    scan_tokens,
    token_inputs,
)


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
    check_shapes("gated_linear_attention", query, key, value, log_decay)

    def token_step(state, x):
        state = x.decay[..., None] * state + x.key[..., None] * x.value[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", x.query, state)

    def chunk_step(state, x):
        return read_chunk(state, x, x.value, chunk_decays(x))

    tokens = token_inputs(query, key, value, log_decay, None, segments)
    out, state = scan_tokens(token_step, chunk_step, tokens, state, chunk)
    return out.astype(value.dtype), state
