"""Softmax attention varied before, between and after its parts: each function is an equation around `attend`.

`options` stands for what else `attend` takes: mask, scale, sinks, backend and so on.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.attend import attend
from attnlab.attention.masks.base import as_mask
from attnlab.attention.masks.basic import causal
from attnlab.attention.pairwise import pair_indices, pytree
from attnlab.attention.scores import Score, bias
from attnlab.errors import InputError


@pytree
class HeadMixScore(Score):
    """Scores of head g = sum_h scores of head h * matrix[h, g], before any are masked."""

    matrix: Float[Array, "H H"]

    def __call__(self, scores, at):
        """See `Score.__call__`."""
        return jnp.einsum("bhts,hg->bgts", scores, self.matrix.astype(scores.dtype))


def talking_heads(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    before: Float[Array, "H H"],
    after: Float[Array, "H H"],
    *,
    score: Any = None,
    **options,
) -> Float[Array, "B T H Dv"]:
    """O_g = sum_h after[h, g] softmax_h(sum_i before[i, h] s_i) V_g: heads mixed on both sides of the softmax
    (Shazeer et al. 2020, arXiv 2003.02436).

    Weights of one head meet values of all, so that the product with the values costs K times as much;
    no backend has to hold the weights for it. `score` changes the mixed scores.

    Raises:
      InputError: heads are sharded over devices.
    """
    if not jax.sharding.get_abstract_mesh().empty and any(
        jax.typeof(x).sharding.spec[-2] for x in (query, value)
    ):
        raise InputError("talking_heads: heads must be whole on every device, reshard first")
    (*batch, s, k, d), h = value.shape, query.shape[-2]
    all_values = jnp.repeat(value.reshape(*batch, s, k * d)[..., None, :], k, axis=-2)
    out = attend(query, key, all_values, score=[HeadMixScore(before), score], **options)
    out = out.reshape(*out.shape[:-1], k, d)
    mixed = jnp.einsum("...thkd,hkg->...tkgd", out, after.reshape(h, k, h // k).astype(out.dtype))
    return mixed.reshape(*out.shape[:-2], d)


def value_residual(
    value: Float[Array, "*B S K Dv"],
    first_value: Float[Array, "*B S K Dv"],
    weights: Float[Array, " 2"],
) -> Float[Array, "*B S K Dv"]:
    """weights[0] * the first layer's values + weights[1] * this layer's, for `attend` to read in place of
    these (Zhou et al. 2024, arXiv 2410.17897).
    """
    old, new = weights.astype(value.dtype)
    return old * first_value + new * value


def gated(out: Float[Array, "*B T H Dv"], gate: Float[Array, "*B T H #Dv"]) -> Float[Array, "*B T H Dv"]:
    """out * sigmoid(gate): a gate for each element, (B, T, H, Dv), or for each head, (B, T, H, 1) (Qiu et al.
    2025, arXiv 2505.06708, equation 5).
    """
    return out * jax.nn.sigmoid(gate).astype(out.dtype)


def differential(
    queries: Float[Array, "2 *B T H D"],
    keys: Float[Array, "2 *B S K D"],
    value: Float[Array, "*B S K Dv"],
    factor: Float[Array, ""] | float,
    **options,
) -> Float[Array, "*B T H Dv"]:
    """(softmax(Q1 K1^T) - factor * softmax(Q2 K2^T)) V: what two attentions share is noise (Ye et al. 2024,
    arXiv 2410.05258, equation 1).

    `factor` is the paper's lambda, see `differential_factor`.
    The paper goes on with (1 - lambda_init) * RMSNorm of each head, see `rms_norm`.
    """
    signal, noise = (attend(query, key, value, **options) for query, key in zip(queries, keys, strict=True))
    return signal - jnp.asarray(factor, signal.dtype) * noise


def differential_factor(
    queries: Float[Array, "2 D"], keys: Float[Array, "2 D"], init: float
) -> Float[Array, ""]:
    """lambda = exp(q1 . k1) - exp(q2 . k2) + init, of learned vectors (arXiv 2410.05258, equation 2)."""
    signal, noise = jnp.exp(jnp.sum(queries * keys, axis=-1))
    return signal - noise + init


def differential_init(layer: int) -> float:
    """lambda_init = 0.8 - 0.6 exp(-0.3 * layer), the layer counted from 0 (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def latent(
    query: Float[Array, "*B T H Dc"],
    rotated_query: Float[Array, "*B T H Dr"],
    cache: Float[Array, "*B S R"],
    rotated_key: Float[Array, "*B S Dr"],
    up_key: Float[Array, "R H Dc"],
    up_value: Float[Array, "R H Dv"],
    *,
    scale: float | None = None,
    **options,
) -> Float[Array, "*B T H Dv"]:
    """Multi-head latent attention with the up-projections absorbed: `latent_expanded` computed as one key
    head of width R + Dr that all query heads share (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

        q_h . U_h c = (U_h^T q_h) . c        sum_s w_s U'_h c_s = U'_h (sum_s w_s c_s)

    So the cache of a token is its latent vector c and its rotated key alone, R + Dr numbers.
    """
    inward = jnp.einsum("...thd,rhd->...thr", query, up_key)
    queries = jnp.concatenate([inward, rotated_query], axis=-1)
    keys = jnp.concatenate([cache, rotated_key], axis=-1)[..., None, :]
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] + rotated_query.shape[-1])
    out = attend(queries, keys, cache[..., None, :], scale=scale, **options)
    return jnp.einsum("...thr,rhd->...thd", out, up_value)


def latent_expanded(
    query: Float[Array, "*B T H Dc"],
    rotated_query: Float[Array, "*B T H Dr"],
    cache: Float[Array, "*B S R"],
    rotated_key: Float[Array, "*B S Dr"],
    up_key: Float[Array, "R H Dc"],
    up_value: Float[Array, "R H Dv"],
    **options,
) -> Float[Array, "*B T H Dv"]:
    """Multi-head latent attention with keys [U_h c; k_r] and values U'_h c written out, which costs less
    where queries are as many as keys (DeepSeek-V2, arXiv 2405.04434, equations 10 to 19).

    Args:
      query: what meets the latent vectors' keys, without positions.
      rotated_query: what meets the rotated keys.
      cache: the latent vector c of each token.
      rotated_key: the one key of each token that has its position, shared by all heads.
      up_key: U, from latent vectors to keys.
      up_value: U', from latent vectors to values.
      options: what else `attend` takes; the scale is 1 / sqrt(Dc + Dr) unless given.
    """
    keys, values = (jnp.einsum("...sr,rhd->...shd", cache, up) for up in (up_key, up_value))
    shared = jnp.broadcast_to(rotated_key[..., None, :], (*keys.shape[:-1], rotated_key.shape[-1]))
    queries = jnp.concatenate([query, rotated_query], axis=-1)
    return attend(queries, jnp.concatenate([keys, shared], axis=-1), values, **options)


def selective(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K Dv"],
    *,
    mask: Any = None,
    score: Any = None,
    scale: float | None = None,
    **options,
) -> Float[Array, "B T H Dv"]:
    """softmax(Q K^T - F) V with F[i, j] = sum over l < i of max(0, s[l, j]), s the first head's scores: a
    token may take earlier ones out of sight of later ones (Leviathan et al. 2024, arXiv 2410.02703).

    Neither the first token nor l itself is taken out by l. The mask is causal unless given; F takes
    memory quadratic in the length.

    Raises:
      InputError: queries and keys are not of one sequence.
    """
    (b, t, _, d), s = query.shape, key.shape[1]
    if t != s:
        raise InputError(f"selective: queries and keys are of one sequence, not {t} and {s}")
    mask = causal() if mask is None else as_mask(mask)
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = scale * jnp.einsum("btd,bsd->bts", query[:, :, 0], key[:, :, 0])
    at = pair_indices(b, 1, t, s)
    chosen = (mask.evaluate(at) & (at.kv > 0) & (at.kv != at.q))[:, 0]
    taken = jnp.where(chosen, jax.nn.relu(scores), 0)
    before = jnp.cumsum(jnp.pad(taken[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)
    return attend(query, key, value, mask=mask, score=[score, bias(-before[:, None])], scale=scale, **options)


def rms_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    epsilon: float = 1e-6,
    axes: tuple[int, ...] = (-1,),
) -> Float[Array, "..."]:
    """Return scale * x / sqrt(mean(x^2) + epsilon), computed in float32 at least.

    (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.) The mean is over `axes`; a scale of fewer
    dimensions than x broadcasts from the right.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + epsilon)
    return (y * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


def qk_norm(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    query_scale: Float[Array, " D"],
    key_scale: Float[Array, " D"],
) -> tuple[Float[Array, "*B T H D"], Float[Array, "*B S K D"]]:
    """The query and key of `attend` with each head normalised, which bounds the scores (Henry et al. 2020,
    arXiv 2010.04245; by root mean square as in OLMo 2, arXiv 2501.00656).
    """
    return rms_norm(query, query_scale), rms_norm(key, key_scale)
