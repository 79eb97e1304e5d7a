"""Zeroed queries, keys and values where a mask excludes them from every pair.

Their weights are 0, but 0 * NaN is NaN: without this, a NaN or infinity in padding or in an unused
slot of a KV cache would reach the output and the gradients.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.blocks import BlockOffset
from attnlab.attention.masks.normal_form import NormalForm, normal_form


def zero_masked(
    allowed: Bool[Array, "b h t s"] | None,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K Dv"]]:
    """Return the arrays with 0 for queries without keys, and for keys and values without queries.

    `allowed` broadcasts to (B, H, T, S). None allows every pair.
    """
    if allowed is None:
        return query, key, value
    has_keys = jnp.swapaxes(allowed.any(3), 1, 2)[..., None]  # (B, T, H, 1)
    has_queries = allowed.any(2)  # (B, H, S)
    if has_queries.shape[1] > 1:
        b, h, s = has_queries.shape
        has_queries = has_queries.reshape(b, key.shape[2], h // key.shape[2], s).any(2)
    has_queries = jnp.swapaxes(has_queries, 1, 2)[..., None]  # (B, S, K, 1)
    return jnp.where(has_keys, query, 0), jnp.where(has_queries, key, 0), jnp.where(has_queries, value, 0)


def with_zeroed(args: AttentionArgs, allowed: Bool[Array, "b h t s"] | None = None) -> AttentionArgs:
    """Return the arguments with zeros by `zero_masked`, or without `allowed` by `zero_padding`."""
    arrays = args.query, args.key, args.value
    query, key, value = zero_padding(args.mask, *arrays) if allowed is None else zero_masked(allowed, *arrays)
    return dataclasses.replace(args, query=query, key=key, value=value)


def zero_padding(mask: Mask | None, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Return the arrays with 0 in padding, which a part of the mask excludes from all pairs.

    Unlike `zero_masked`, it does not evaluate the mask. The parts are those of the normal form:
    segment 0, lengths, causal masks and windows.
    """
    has_keys, has_queries = _used(normal_form(mask), query.shape[1], key.shape[1])
    for used in has_keys:
        query = jnp.where(used[..., None, None], query, 0)
    for used in has_queries:
        key, value = (jnp.where(used[..., None, None], x, 0) for x in (key, value))
    return query, key, value


def padding_is_all(mask: Mask | None, offset: BlockOffset, t: int, s: int) -> bool:
    """Return whether `zero_padding` is known to find every masked position.

    In self-attention it does if all positions but padding attend to themselves.
    """
    if mask is None:
        return True
    form = normal_form(mask)
    is_aligned = t == s and all(isinstance(i, int) and i == 0 for i in offset[2:])
    if not is_aligned or form.static_bounds is None or form.intervals or form.rest is not None:
        return False
    segments, lengths = form.segments, form.lengths
    if segments is not None and segments.queries is not segments.keys:
        return False
    # Queries after the last key may have keys, if no other part masks those.
    only_keys = lengths is not None and lengths.queries is None and segments is form.left is None
    if lengths is not None and lengths.queries is not lengths.keys and not only_keys:
        return False
    return all(bound is None or bound >= 0 for bound in form.static_bounds)


def _used(form: NormalForm, t: int, s: int) -> tuple[list[Array], list[Array]]:
    """Return which queries have keys, (b, T), and which keys have queries, (b, S)."""
    q, k = jnp.arange(t)[None], jnp.arange(s)[None]
    has_keys, has_queries = [], []
    if form.segments is not None:
        has_keys.append(jnp.asarray(form.segments.queries) > 0)
        has_queries.append(jnp.asarray(form.segments.keys) > 0)
    if form.lengths is not None:
        keys, num_queries = jnp.reshape(form.lengths.keys, (-1, 1)), form.lengths.queries
        queries = jnp.full((1, 1), t) if num_queries is None else jnp.reshape(num_queries, (-1, 1))
        has_keys += [] if num_queries is None else [(q < queries) & (keys > 0)]
        has_queries.append((k < keys) & (queries > 0))
    left, right = form.static_bounds or (None, None)
    if right is not None:
        has_keys += [q + right >= 0] if right < 0 else []
        has_queries += [k < t + right] if t + right < s else []
    if left is not None:
        has_keys += [q - left < s] if t - left > s else []
        has_queries += [k + left >= 0] if left < 0 else []
    return has_keys, has_queries
