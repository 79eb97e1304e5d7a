"""Limits and input layout shared by the two TPU kernels, splash and flash attention."""

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention.backends.registry import (
    AttentionArgs,
    kernel_mesh_reason,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import even_block_size

LANES = 128  # lanes of a TPU vector register; block sizes are multiples of this
Pair = tuple[int, int]  # (for queries, for keys)


def tpu_unsupported_reason(args: AttentionArgs, interpret: bool) -> str | None:
    """Return why neither kernel supports the arguments, or None."""
    if args.platform != "tpu" and not interpret:
        return f"it requires a TPU, not a {args.platform.upper()}"
    if reason := sharded_length_reason(args) or softmax_only_reason(args) or kernel_mesh_reason(args):
        return reason
    dtypes = {x.dtype.name for x in (args.query, args.key, args.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"query, key and value must all be bfloat16 or all float32, not {', '.join(sorted(dtypes))}"
    if min(args.query.shape[1], args.key.shape[1]) < LANES and not interpret:
        return f"it needs at least {LANES} queries and {LANES} keys"
    return None


def kernel_block_sizes(args: AttentionArgs, max_block_size: int) -> Pair:
    """Return block_q and block_kv: equal parts of the lengths, rounded up to `LANES`."""
    q, kv = (-(-even_block_size(x.shape[1], max_block_size) // LANES) * LANES for x in (args.query, args.key))
    return q, kv


def round_up(lengths: Pair, block_sizes: Pair) -> Pair:
    """Return the lengths rounded up to whole blocks."""
    q, kv = (-(-length // size) * size for length, size in zip(lengths, block_sizes, strict=True))
    return q, kv


def to_bhtd(args: AttentionArgs, padded: Pair) -> Iterator[Array]:
    """Yield the scaled query, the key and the value as (B, H, T, D), padded to these lengths."""
    query = (args.query * args.scale).astype(args.query.dtype)
    for x, length in zip((query, args.key, args.value), (padded[0], padded[1], padded[1]), strict=True):
        x = jnp.swapaxes(x, 1, 2)
        yield jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def pad_scores(x: Array, padded: Pair, fill_value) -> Array:
    """Return an array (B, H, T, S), such as a mask or a bias, padded to these lengths."""
    widths = [(0, length - n) for n, length in zip(x.shape[-2:], padded, strict=True)]
    return jnp.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill_value)
