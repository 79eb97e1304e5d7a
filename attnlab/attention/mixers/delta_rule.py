"""The delta rule: linear attention that replaces what its state holds for a key by the new value.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

where u_t is what v_t differs by from what S holds for k_t. Token by token or chunk by chunk, as in `linear`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention.mixers.recurrence import (
    check_shapes,
    chunk_decays,
    decayed_products,
    read_chunk,
    scan_tokens,
    token_inputs,
)


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
    check_shapes("gated_delta_rule", query, key, value, log_decay[..., None])

    def token_step(state, x):
        state = x.decay[..., None] * state
        change = x.beta * (x.value - jnp.einsum("bhd,bhde->bhe", x.key, state))
        state = state + x.key[..., None] * change[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", x.query, state)

    def chunk_step(state, x):
        decays = chunk_decays(x)
        lower = x.beta * jnp.tril(decayed_products(x.key, x.key, decays), -1)
        held = jnp.einsum("bhid,bhde->bhie", x.key * decays.since_entry, state)
        change = jax.scipy.linalg.solve_triangular(
            lower, x.beta * (x.value - held), lower=True, unit_diagonal=True
        )
        return read_chunk(state, x, change, decays)

    tokens = token_inputs(query, key, value, log_decay[..., None], beta[..., None], segments)
    out, state = scan_tokens(token_step, chunk_step, tokens, state, chunk)
    return out.astype(value.dtype), state
