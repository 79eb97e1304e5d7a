"""Linear attention: causal attention without softmax, with one state matrix S per head.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Memory and cost are linear in the length. Each function runs token by token, as written above
(`chunk=None`), or chunk by chunk, as described in `recurrence`. Queries and keys are used
unchanged: the caller applies scaling, norms and gates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.arrays import wide
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
    """Linear attention with a positive feature map f, by default elu(x) + 1.

        o_t = sum_{j <= t} (f(q_t) . f(k_j)) v_j / sum_{j <= t} f(q_t) . f(k_j)

    (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.) The state is that of
    `gated_linear_attention` for values with an additional column of ones, which accumulates the
    denominator. The other arguments are those of `gated_linear_attention`.
    """
    promoted = value.astype(wide(value))
    out, state = gated_linear_attention(
        feature(query),
        feature(key),
        jnp.concatenate([promoted, jnp.ones_like(promoted[..., :1])], axis=-1),
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
    """Retention: o_t = sum_{j <= t} g^(t-j) (q_t . k_j) v_j with decay g = 1 - 2^(-5-h) of head h.

    (RetNet, Sun et al. 2023, arXiv 2307.08621, section 2.) Apply positions to queries and keys
    beforehand, with `rotary`. The arguments are those of `gated_linear_attention`.
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
    """Gated linear attention: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

    (Yang et al. 2023, arXiv 2312.06635, section 4.)

    Args:
      query: (B, T, H, D).
      key: (B, T, H, D).
      value: (B, T, H, Dv).
      log_decay: log a_t <= 0, one per dimension of the key, (B, T, H, D), or one for all of them,
        (B, T, H, 1). With one per dimension, memory within a chunk grows by a factor D; use chunks
        of about 16 tokens.
      state: S before the first token, to continue a sequence; None means 0.
      segments: ids of packed documents; S is reset to 0 where the id changes.
      chunk: tokens per chunk; None runs the recurrence token by token.

    Returns:
      The output in the dtype of `value`, and S after the last token in at least float32.

    Raises:
      InputError: the shapes do not match, or `chunk` is below 1.
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
