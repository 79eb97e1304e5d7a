"""Published variants of softmax attention, each a function built on `attend`.

`options` are further keyword arguments of `attend`, such as `mask`, `scale`, `sinks` and `backend`.
With `return_weights`, the result is a tuple as that of `attend`, with the variant's own weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.arrays import rms_norm
from attnlab.attention.attend import attend
from attnlab.attention.masks.base import as_mask
from attnlab.attention.masks.basic import causal
from attnlab.attention.pairwise import pair_indices, pytree
from attnlab.attention.scores import Score, bias
from attnlab.errors import InputError


@pytree
class HeadMixScore(Score):
    """Mixes unmasked scores across heads: new[g] = sum_h matrix[h, g] * scores[h]."""

    matrix: Float[Array, "H H"]

    mixes_heads = True

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
) -> Float[Array, "B T H Dv"] | tuple[Array, ...]:
    """Talking-heads attention: mix the heads before and after the softmax.

        O_g = sum_h after[h, g] softmax(sum_i before[i, h] s_i) V_g

    (Shazeer et al. 2020, arXiv 2003.02436.) The weights of each head are multiplied by the values
    of all K key/value heads, so that product costs K times as much, but no backend has to
    materialize the weights. `score` modifies the mixed scores.

    Raises:
      InputError: heads are sharded over devices.
    """
    if not jax.sharding.get_abstract_mesh().empty and any(
        jax.typeof(x).sharding.spec[-2] for x in (query, value)
    ):
        raise InputError("talking_heads: heads must not be sharded; reshard query and value first")
    (*batch, s, k, d), h = value.shape, query.shape[-2]
    all_values = jnp.repeat(value.reshape(*batch, s, k * d)[..., None, :], k, axis=-2)
    result = attend(query, key, all_values, score=[HeadMixScore(before), score], **options)
    out, *weights = result if isinstance(result, tuple) else (result,)
    out = out.reshape(*out.shape[:-1], k, d)
    mixed = jnp.einsum("...thkd,hkg->...tkgd", out, after.reshape(h, k, h // k).astype(out.dtype))
    mixed = mixed.reshape(*out.shape[:-2], d)
    return (mixed, *(jnp.einsum("bhts,hg->bgts", w, after) for w in weights)) if weights else mixed


def value_residual(
    value: Float[Array, "*B S K Dv"],
    first_value: Float[Array, "*B S K Dv"],
    weights: Float[Array, " 2"],
) -> Float[Array, "*B S K Dv"]:
    """Return weights[0] * first_value + weights[1] * value, to be passed to `attend` as the values.

    `first_value` are the values of the first layer (Zhou et al. 2024, arXiv 2410.17897).
    """
    first_weight, weight = weights.astype(value.dtype)
    return first_weight * first_value + weight * value


def gated(out: Float[Array, "*B T H Dv"], gate: Float[Array, "*B T H #Dv"]) -> Float[Array, "*B T H Dv"]:
    """Return out * sigmoid(gate).

    There is one gate per element, (B, T, H, Dv), or one per head, (B, T, H, 1) (Qiu et al. 2025,
    arXiv 2505.06708, equation 5).
    """
    return out * jax.nn.sigmoid(gate).astype(out.dtype)


def differential(
    queries: Float[Array, "2 *B T H D"],
    keys: Float[Array, "2 *B S K D"],
    value: Float[Array, "*B S K Dv"],
    factor: Float[Array, ""] | float,
    **options,
) -> Float[Array, "*B T H Dv"] | tuple[Array, ...]:
    """Differential attention: (softmax(Q1 K1^T) - factor * softmax(Q2 K2^T)) V.

    The difference cancels noise that both attention maps share (Ye et al. 2024, arXiv 2410.05258,
    equation 1). `factor` is the paper's lambda; see `differential_factor`. The paper then applies
    (1 - lambda_init) * RMSNorm to each head, which is not included here; see
    `arrays.rms_norm`.
    """
    results = (attend(query, key, value, **options) for query, key in zip(queries, keys, strict=True))
    return jax.tree.map(lambda signal, noise: signal - jnp.asarray(factor, signal.dtype) * noise, *results)


def differential_factor(
    queries: Float[Array, "2 D"], keys: Float[Array, "2 D"], init: float
) -> Float[Array, ""]:
    """Return lambda = exp(q1 . k1) - exp(q2 . k2) + init of learned vectors.

    (arXiv 2410.05258, equation 2.)
    """
    signal, noise = jnp.exp(jnp.sum(queries * keys, axis=-1))
    return signal - noise + init


def differential_init(layer: int) -> float:
    """Return lambda_init = 0.8 - 0.6 exp(-0.3 * layer), with layers counted from 0.

    (arXiv 2410.05258, section 2.1.)
    """
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
) -> Float[Array, "*B T H Dv"] | tuple[Array, ...]:
    """Multi-head latent attention (MLA) with absorbed up-projections.

    It equals `latent_expanded`, computed as multi-query attention: all query heads share one key
    head of width R + Dr (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

        q_h . U_h c = (U_h^T q_h) . c        sum_s w_s U'_h c_s = U'_h (sum_s w_s c_s)

    The KV cache therefore holds R + Dr values per token: the latent vector c and the rotated key.
    See `latent_expanded` for the arguments.
    """
    absorbed_query = jnp.einsum("...thd,rhd->...thr", query, up_key)
    queries = jnp.concatenate([absorbed_query, rotated_query], axis=-1)
    keys = jnp.concatenate([cache, rotated_key], axis=-1)[..., None, :]
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] + rotated_query.shape[-1])
    result = attend(queries, keys, cache[..., None, :], scale=scale, **options)
    out, *weights = result if isinstance(result, tuple) else (result,)
    out = jnp.einsum("...thr,rhd->...thd", out, up_value)
    return (out, *weights) if weights else out


def latent_expanded(
    query: Float[Array, "*B T H Dc"],
    rotated_query: Float[Array, "*B T H Dr"],
    cache: Float[Array, "*B S R"],
    rotated_key: Float[Array, "*B S Dr"],
    up_key: Float[Array, "R H Dc"],
    up_value: Float[Array, "R H Dv"],
    **options,
) -> Float[Array, "*B T H Dv"] | tuple[Array, ...]:
    """Multi-head latent attention (MLA) with materialized keys [U_h c; k_r] and values U'_h c.

    This costs less than `latent` when there are as many queries as keys, as in training
    (DeepSeek-V2, arXiv 2405.04434, equations 10 to 19).

    Args:
      query: part of the queries without positions, multiplied with the up-projected keys.
      rotated_query: part of the queries with rotary positions, multiplied with the rotated key.
      cache: latent vector c of each token.
      rotated_key: key of each token with rotary positions, shared by all heads.
      up_key: U, the projection from latent vectors to keys.
      up_value: U', the projection from latent vectors to values.
      options: further arguments of `attend`; `scale` defaults to 1 / sqrt(Dc + Dr).
    """
    arrays = expand_latent(query, rotated_query, cache, rotated_key, up_key, up_value)
    return attend(*arrays, **options)


def expand_latent(
    query: Float[Array, "*B T H Dc"],
    rotated_query: Float[Array, "*B T H Dr"],
    cache: Float[Array, "*B S R"],
    rotated_key: Float[Array, "*B S Dr"],
    up_key: Float[Array, "R H Dc"],
    up_value: Float[Array, "R H Dv"],
) -> tuple[Float[Array, "*B T H D"], Float[Array, "*B S H D"], Float[Array, "*B S H Dv"]]:
    """Return the queries, keys and values of `latent_expanded`."""
    keys, values = (jnp.einsum("...sr,rhd->...shd", cache, up) for up in (up_key, up_value))
    spec = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(keys).sharding.spec
    shape = (*keys.shape[:-1], rotated_key.shape[-1])
    shared = jnp.broadcast_to(rotated_key[..., None, :], shape, out_sharding=spec)
    queries = jnp.concatenate([query, rotated_query], axis=-1)
    return queries, jnp.concatenate([keys, shared], axis=-1), values


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
    """Selective attention: a token can reduce the attention of later tokens to earlier ones.

    Computes softmax(Q K^T - F) V with F[i, j] = sum over l < i of max(0, s[l, j]), where s are the
    scores of the first head (Leviathan et al. 2024, arXiv 2410.02703). Token l does not reduce
    attention to itself or to the first token. The mask defaults to causal. Memory for F is
    quadratic in the length.

    Raises:
      InputError: queries and keys differ in length.
    """
    (b, t, _, d), s = query.shape, key.shape[1]
    if t != s:
        raise InputError(f"selective: queries and keys must be the same sequence; got lengths {t} and {s}")
    mask = causal() if mask is None else as_mask(mask)
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = scale * jnp.einsum("btd,bsd->bts", query[:, :, 0], key[:, :, 0])
    at = pair_indices(b, 1, t, s)
    may_reduce = (mask.evaluate(at) & (at.kv > 0) & (at.kv != at.q))[:, 0]
    reductions = jnp.where(may_reduce, jax.nn.relu(scores), 0)
    f = jnp.cumsum(jnp.pad(reductions[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)
    return attend(query, key, value, mask=mask, score=[score, bias(-f[:, None])], scale=scale, **options)


def qk_norm(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    query_scale: Float[Array, " D"],
    key_scale: Float[Array, " D"],
) -> tuple[Float[Array, "*B T H D"], Float[Array, "*B S K D"]]:
    """Return query and key with RMSNorm applied to each head, which bounds the scores.

    (Henry et al. 2020, arXiv 2010.04245; with RMSNorm as in OLMo 2, arXiv 2501.00656.)
    """
    return rms_norm(query, query_scale), rms_norm(key, key_scale)
