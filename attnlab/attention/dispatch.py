"""`attend`: one call for every attention in the project."""

import math

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnlab.attention.blockwise import blockwise
from attnlab.attention.masks import Mask, Segments
from attnlab.attention.reference import reference
from attnlab.attention.scores import Score
from attnlab.errors import InputError

BACKENDS = ("auto", "reference", "blockwise")


def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
):
    """Attention of `query` over `key` and `value` (Vaswani et al. 2017, equation 1), heads grouped if K < H.

    Args:
      query: (B, T, H, D).
      key: (B, S, K, D), H a multiple of K.
      value: (B, S, K, Dv).
      mask: which pairs may attend; None is all.
      score: elementwise change of the scaled scores.
      scale: factor of the scores; None is 1 / sqrt(D).
      dropout_rate: share of weights dropped, where `dropout_key` is given.
      dropout_key: random key of the dropout.
      backend: "reference", "blockwise", or "auto": blockwise unless weights or dropout are asked for.
      return_lse: also return the float32 log-sum-exp, (B, T, H).
      return_weights: also return the weights before dropout, (B, H, T, S), float32.

    Returns:
      The output (B, T, H, Dv) in the value's dtype, then what was asked for, in that order. A query
      with no key to attend to gets output 0 and log-sum-exp -inf. The result is laid out over the
      mesh as `query` is.

    Raises:
      InputError: shapes or layouts that do not fit, an unknown backend, or one that cannot do what is asked.
    """
    _check_shapes(query, key, value)
    if not 0 <= dropout_rate < 1:
        raise InputError(f"attend: dropout_rate must be at least 0 and under 1, not {dropout_rate}")
    drops = dropout_rate > 0 and dropout_key is not None
    backend = _choose(backend, drops, return_weights)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def local(query, key, value, mask, dropout_key):
        if backend == "blockwise":
            return (*blockwise(query, key, value, mask=mask, score=score, scale=scale), None)
        out, lse, weights = reference(
            query,
            key,
            value,
            mask=mask,
            score=score,
            scale=scale,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
        return out, lse, weights if return_weights else None

    out, lse, weights = _per_device(local)(query, key, value, mask, dropout_key if drops else None)
    extras = [lse] * return_lse + [weights] * return_weights
    return (out, *extras) if extras else out


def _check_shapes(query, key, value) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise InputError(f"attend takes (batch, length, heads, head_dim) arrays; got {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise InputError(f"attend: batch, length and heads of key and value must agree; got {shapes}")
    if query.shape[3] != key.shape[3]:
        raise InputError(f"attend: query and key must have one head_dim; got {shapes}")
    if query.shape[2] % key.shape[2]:
        hint = ""
        if query.shape[1] % key.shape[1] == 0:
            hint = (
                "; laid out (batch, heads, length, head_dim)? attend takes (batch, length, heads, head_dim)"
            )
        raise InputError(f"attend: query heads must be a multiple of key heads; got {shapes}{hint}")


def _choose(backend: str, drops: bool, return_weights: bool) -> str:
    if backend not in BACKENDS:
        raise InputError(f"attend: unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    needs_weights = drops or return_weights
    if backend == "blockwise" and needs_weights:
        what = "dropout" if drops else "return_weights"
        raise InputError(f"attend: blockwise never holds the weights, so {what} needs backend='reference'")
    if backend == "auto":
        return "reference" if needs_weights else "blockwise"
    return backend


def _local_key(key, layout):
    """A dropout key of this device's own, so that no two shards drop the same places.

    Devices that hold the same rows and heads keep one key: they must agree.
    """
    if key is None:
        return None
    for axes in layout:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def _per_device(local):
    """Runs `local` on each device's own batch rows and heads, as the types of the arguments say."""

    def run(query, key, value, mask, dropout_key):
        layouts = [() if jax.sharding.get_abstract_mesh().empty else _spec(x) for x in (query, key, value)]
        if not any(map(any, layouts)):
            return local(query, key, value, mask, dropout_key)
        batch, heads = _check_layouts(layouts, key.shape[2])

        def place(m):
            if not isinstance(m, Segments):
                return m
            whole = query.shape[0]
            return Segments(
                *(
                    jax.sharding.reshard(x, P(batch if x.shape[0] == whole else None, None))
                    for x in (m.queries, m.keys)
                )
            )

        mask = jax.tree.map(place, mask, is_leaf=lambda m: isinstance(m, Segments))
        arguments = (query, key, value, mask, dropout_key)
        out_specs = (P(batch, None, heads, None), P(batch, None, heads), P(batch, heads, None, None))
        return jax.shard_map(
            lambda q, k, v, m, d: local(q, k, v, m, _local_key(d, (batch, heads))),
            in_specs=jax.tree.map(_spec, arguments),
            out_specs=out_specs,
            check_vma=False,
        )(*arguments)

    return run


def _spec(x) -> P:
    return jax.typeof(x).sharding.spec


def _check_layouts(layouts, kv_heads: int):
    """The mesh axes of batch and heads, after a check that each device has all it needs of its rows."""
    query, key, value = layouts
    if any(spec[1] or spec[3] for spec in layouts):
        raise InputError(
            "attend: length and head_dim must be whole on every device, reshard first; laid out are "
            f"query {query}, key {key}, value {value}"
        )
    # One key head serves every query head, wherever those lie.
    heads = (query[2],) if kv_heads > 1 else (query[2], None)
    if any(spec[0] != query[0] or spec[2] not in heads for spec in (key, value)):
        raise InputError(
            "attend: batch and heads of key and value must be laid out as the query's, reshard first; laid "
            f"out are query {query}, key {key}, value {value}"
        )
    return query[0], query[2]


def causal_pairs(length: int, left: int | None = None) -> int:
    """Number of (query, key) pairs a causal mask allows, within `left` keys back if given."""
    if left is None or left >= length:
        return length * (length + 1) // 2
    full = left + 1
    return full * (full + 1) // 2 + (length - full) * full
