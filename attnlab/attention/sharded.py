"""Runs functions on each device's shard, as the shardings in the types of the arrays specify."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnlab.attention.backends.registry import AttentionArgs, AttentionResult
from attnlab.attention.block_mask import BlockMask, make_block_mask
from attnlab.attention.masks.basic import depends_on_batch_and_heads, is_static
from attnlab.attention.pairwise import BlockGrid, BlockOffset
from attnlab.errors import InputError


def with_mesh(args: AttentionArgs) -> tuple[AttentionArgs, list[P] | None]:
    """Return the arguments with the axes of the mesh, and the layouts of query, key and value.

    The layouts are None if no Explicit axis is larger than 1.

    Raises:
      InputError: the shardings of query, key and value do not match.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
    auto_axes = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)
    args = dataclasses.replace(args, auto_axes=auto_axes)
    arrays = args.query, args.key, args.value
    layouts = [_spec(x) if explicit else P(None, None, None, None) for x in arrays]
    is_sharded = any(map(any, layouts))
    if not is_sharded and math.prod(explicit.values()) <= 1:
        return args, None
    _, sequence, _ = _check_layouts(layouts, args.key.shape[2])
    if args.block_mask is not None:
        _check_block_mask(args.block_mask, layouts[0])
    sharding: dict[str, Any] = {"is_sharded": is_sharded, "sequence_axes": _axes(sequence)}
    return dataclasses.replace(args, sequence_shards=_count_shards(sequence), **sharding), layouts


def _check_block_mask(block_mask: BlockMask, layout: P) -> None:
    """Raise if the lists of a block mask cannot be sharded like the queries."""
    shards = [_count_shards(axes) for axes in layout[:3]]
    batch, heads = block_mask.num_lists
    blocks = batch, block_mask.q_length / block_mask.block_q, heads
    for count, n, name in zip(shards, blocks, ("rows", "blocks of queries", "heads"), strict=True):
        if count > 1 and n > 1 and n % count:
            raise InputError(
                f"attend: block_mask has {n:g} {name}, and they are sharded over {count} devices; "
                "call prepare in the same mesh"
            )


def local_args(args: AttentionArgs, layouts: list[P]) -> AttentionArgs:
    """Return the arguments with the shapes of one device's query, key and value."""
    query, key, value = map(_local_shape, (args.query, args.key, args.value), layouts)
    return dataclasses.replace(args, query=query, key=key, value=value)


def run_shards(
    run: Callable[[AttentionArgs, BlockOffset], AttentionResult], args: AttentionArgs, layouts: list[P]
) -> AttentionResult:
    """Return the result of `run` on each device's shard, sharded like the query."""
    batch, sequence, heads = layouts[0][:3]
    weights = P(batch, heads, sequence, None) if args.return_weights else None
    out_specs = P(batch, sequence, heads, None), P(batch, sequence, heads), weights
    arrays = args.query, args.key, args.value
    return AttentionResult(*map_shards(lambda *x: tuple(run(*x)), args, layouts, arrays, out_specs))


def map_shards(
    function: Callable[[AttentionArgs, BlockOffset], Any],
    args: AttentionArgs,
    layouts: list[P],
    arrays: Sequence[Array],
    out_specs: Any,
) -> Any:
    """Return `function(args, offset)` of each device's shard.

    Args:
      function: gets the arguments of the shard, and the indices of its first pair.
      args: the arguments.
      layouts: the specs of query, key and value.
      arrays: query, key and value. If empty, the function gets their shapes.
      out_specs: the specs of the results.
    """
    batch, sequence, heads = layouts[0][:3]
    axes = {"batch": batch, "heads": heads, "queries": sequence, "q_blocks": sequence}
    shapes = local_args(args, layouts)

    def spec(x, dims) -> P:
        # Shard like the scores, whose keys are not sharded. Dimensions of 1 are replicated.
        return P(*(axes.get(name) if n > 1 else None for name, n in zip(dims, jnp.shape(x), strict=True)))

    # Replicated constants stay constants: as arguments of `shard_map` they would be traced, and a
    # backend could not evaluate the mask at trace time.
    values = args.mask, args.score, args.dropout, args.block_mask
    specs = jax.tree.leaves([x if x is None else x.map_arrays(spec) for x in values], is_leaf=_is_spec)
    leaves, structure = jax.tree.flatten(values)
    is_argument = [any(spec) or not _is_replicated_constant(x) for x, spec in zip(leaves, specs, strict=True)]
    specs = [spec for spec, keep in zip(specs, is_argument, strict=True) if keep]
    arguments = [x for x, keep in zip(leaves, is_argument, strict=True) if keep]
    constants = [_as_constant(x) for x, keep in zip(leaves, is_argument, strict=True) if not keep]
    sinks = None if args.sinks is None else jax.sharding.reshard(args.sinks, P(heads))

    def local(arrays, arguments, sinks):
        sources = iter(constants), iter(arguments)
        mask, score, dropout, block_mask = structure.unflatten(
            next(sources[is_arg]) for is_arg in is_argument
        )
        query, key, value = arrays or (shapes.query, shapes.key, shapes.value)
        offset = _shard_start(batch, query.shape[0]), _shard_start(heads, query.shape[2]), 0, 0
        shard = dataclasses.replace(
            args,
            query=query,
            key=key,
            value=value,
            mask=mask,
            score=score,
            sinks=sinks,
            dropout=dropout,
            block_mask=block_mask,
        )
        return function(shard, offset)

    return jax.shard_map(
        local,
        in_specs=(tuple(layouts[: len(arrays)]), specs, P(heads)),
        out_specs=out_specs,
        axis_names=set(jax.sharding.get_abstract_mesh().explicit_axes),
        check_vma=False,
    )(tuple(arrays), list(map(jax.sharding.reshard, arguments, specs)), sinks)


def prepare_shards(args: AttentionArgs, layouts: list[P], sizes: tuple[int, int]) -> BlockMask:
    """Return the block mask that each device computes for its rows, heads and queries."""
    _, _, t, s = args.score_shape
    (batch, sequence, heads), axes = layouts[0][:3], args.sequence_axes
    made: list[BlockMask] = []

    def local(shard: AttentionArgs, offset: BlockOffset):
        b, h, count, _ = shard.score_shape
        if axes:
            offset = (*offset[:2], jax.lax.axis_index(axes) * count, 0)
        part = whole = make_block_mask(shard.mask, BlockGrid(count, s, *sizes, b, h, offset))
        if axes:
            partial_, full = (jax.lax.all_gather(x, axes, axis=2, tiled=True) for x in part.to_dense())
            whole = BlockMask.from_partial_and_full(partial_, full, BlockGrid(t, s, *sizes))
        made.append(dataclasses.replace(whole, info=part.info))  # type: ignore[type-var]
        arrays = *part.arrays[:4], *whole.arrays[4:]
        return tuple(map(jnp.asarray, arrays))

    differ = (False, False) if args.mask is None else depends_on_batch_and_heads(args.mask)
    batch, heads = (axis if differs else None for axis, differs in zip((batch, heads), differ, strict=True))
    out_specs = (P(batch, heads, sequence),) * 4 + (P(batch, heads),) * 4
    arrays = map_shards(local, args, layouts, (), out_specs)
    return made[0].with_arrays(arrays)


def _local_shape(x, spec: P) -> Any:
    """Return the shape and dtype of one device's shard."""
    lengths = (n // _count_shards(axes) for n, axes in zip(x.shape, spec, strict=True))
    return jax.ShapeDtypeStruct(tuple(lengths), x.dtype)


def _is_spec(x) -> bool:
    return isinstance(x, P)


def _is_replicated_constant(x: Array | np.ndarray | float) -> bool:
    """Return whether an array is concrete at trace time, fully replicated, and not a random key."""
    if isinstance(x, int | float):
        return True
    if not is_static(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_replicated


def _as_constant(x):
    return x if isinstance(x, int | float) else np.asarray(x)


def _axes(entry) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _count_shards(axes) -> int:
    """Return the number of shards of a dimension that is sharded over mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in _axes(axes))


def _shard_start(axes, length: int):
    """Return the offset of this device's shard in a dimension sharded over mesh axes."""
    return jax.lax.axis_index(axes) * length if _count_shards(axes) > 1 else 0


def _spec(x) -> P:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jax.typeof(x).sharding.spec
    spec = () if x.sharding is None else x.sharding.spec
    return P(*spec, *[None] * (x.ndim - len(spec)))


def _check_layouts(layouts, kv_heads: int):
    """Return the mesh axes of batch, length and heads; raise if the shardings do not match."""
    query, key, value = layouts
    message = f"shardings are query {query}, key {key}, value {value}"
    if any(spec[3] for spec in layouts):
        raise InputError(f"attend: head_dim must not be sharded, reshard first; {message}")
    # A single key head may be replicated while the query heads are sharded.
    heads = (query[2],) if kv_heads > 1 else (query[2], None)
    if any(spec[:2] != query[:2] or spec[2] not in heads for spec in (key, value)):
        raise InputError(
            f"attend: batch, length and heads of key and value must be sharded like the query, "
            f"reshard first; {message}"
        )
    return query[0], query[1], query[2]
