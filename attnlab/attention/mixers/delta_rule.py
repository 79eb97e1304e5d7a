"""The delta rule: linear attention that replaces the value stored under a key by a new one.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

u_t is proportional to the difference between v_t and the value that S stores under k_t. It runs
token by token or chunk by chunk, like `linear`.
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
    """Gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464, equation 10).

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

    A fraction b_t of the value that S stores under k_t is replaced by v_t. In the form of the
    module docstring, u_t = b_t (v_t - a_t S_{t-1}^T k_t). Within a chunk this is a triangular
    system: (I + L) U = b (V - A K S_0) with L_ij = b_i (k_i . A_{j..i} k_j) for j < i (section
    3.3). The state stays bounded for keys of norm 1 and b_t in (0, 2). Decays of 1 give DeltaNet
    (arXiv 2406.06484).

    Args:
      query: (B, T, H, D).
      key: (B, T, H, D).
      value: (B, T, H, Dv).
      log_decay: log a_t <= 0.
      beta: b_t, the fraction of the stored value to replace.
      state: S before the first token, to continue a sequence; None means 0.
      segments: ids of packed documents; S is reset to 0 where the id changes.
      chunk: tokens per chunk; None runs the recurrence token by token.

    Returns:
      The output in the dtype of `value`, and S after the last token in at least float32.

    Raises:
      InputError: the shapes do not match, or `chunk` is below 1.
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
