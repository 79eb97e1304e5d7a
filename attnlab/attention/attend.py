"""The attention call `attend`, and `explain`, which reports how a call would run."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnlab.attention.backends.blockwise import Blockwise, BlockwiseAutodiff, default_block_sizes
from attnlab.attention.backends.cudnn import Cudnn
from attnlab.attention.backends.decode import Decode
from attnlab.attention.backends.flash import Flash
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import (
    BACKENDS,
    AttentionArgs,
    AttentionResult,
    Backend,
    select_backend,
)
from attnlab.attention.backends.splash import Splash
from attnlab.attention.backends.tokamax import Tokamax
from attnlab.attention.block_mask import is_static
from attnlab.attention.context_parallel import AllGather, AllToAll, Ring
from attnlab.attention.masks.base import BlockGrid, Mask, as_mask
from attnlab.attention.normalizers import softmax
from attnlab.attention.scores import as_score
from attnlab.errors import InputError

# The order in which "auto" tries backends. `register` inserts other backends before these.
AUTO_ORDER: tuple[Backend, ...] = (
    Ring(),
    AllToAll(),
    AllGather(),
    Splash(),
    Flash(),
    Cudnn(),
    Tokamax(),
    Decode(),
    Blockwise(),
    BlockwiseAutodiff(),
    Reference(),
)
BACKENDS.extend(AUTO_ORDER)


def attend(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    *,
    mask: Mask | Callable | Array | np.ndarray | None = None,
    score: Any = None,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    normalizer: Callable = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    backend: str | Backend = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
):
    """Compute attention of `query` over `key` and `value` (Vaswani et al. 2017, equation 1).

    Args:
      query: (B, T, H, D), with any number of batch dimensions.
      key: (B, S, K, D). H must be a multiple of K; H > K is grouped-query attention.
      value: (B, S, K, Dv).
      mask: a mask, a boolean array, or a function of (b, h, q, k). None allows every pair.
      score: modifies the scaled scores: a score, a function of (score, b, h, q, k), or a sequence.
      scale: factor of the scores, 1 / sqrt(D) by default.
      sinks: one extra logit per head that takes part in the softmax and has no value, (H,).
      normalizer: maps masked scores to weights over the last axis. Every backend but "reference"
        requires `softmax`.
      dropout_rate: fraction of the weights to drop. Without `dropout_key`, no weight is dropped.
      dropout_key: random key of the dropout.
      backend: a name, a `Backend`, or "auto": the first backend in order that supports the call.
        `explain` returns the selected backend and the reasons against the others.
      return_lse: also return the log-sum-exp of the scores, (B, T, H), float32.
      return_weights: also return the weights before dropout, (B, H, T, S), float32.

    Returns:
      The output (B, T, H, Dv) in the dtype of `value`, sharded like `query`; then, if requested,
      the log-sum-exp and the weights. A query without keys has output 0 and log-sum-exp -inf.

    Raises:
      InputError: Shapes or shardings do not match, or the backend is unknown or unsupported.
    """
    _check_arguments(query, key, value, dropout_rate)
    batch = query.shape[:-3]
    arrays = [x.reshape(-1, *x.shape[-3:]) if len(batch) != 1 else x for x in (query, key, value)]
    args = AttentionArgs(
        query=arrays[0],
        key=arrays[1],
        value=arrays[2],
        mask=None if mask is None else as_mask(mask),
        score=as_score(score),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        sinks=sinks,
        normalizer=normalizer,
        dropout_rate=0.0 if dropout_key is None else dropout_rate,
        dropout_key=dropout_key if dropout_rate else None,
        return_weights=return_weights,
        return_lse=return_lse,
        platform=_platform(),
    )
    _check_values(args)
    result = _run_sharded(backend, args)
    out, lse, weights = (
        x if x is None or len(batch) == 1 else x.reshape(*batch, *x.shape[1:]) for x in result
    )
    extras = [lse] * return_lse + [weights] * return_weights
    return (out, *extras) if extras else out


def _check_arguments(query, key, value, dropout_rate) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise InputError(f"attend takes (batch, length, heads, head_dim) arrays; got {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[:-3] != key.shape[:-3]:
        raise InputError(f"attend: batch, length and heads of key and value must be equal; got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise InputError(f"attend: query and key must have the same head_dim; got {shapes}")
    if query.shape[-2] % key.shape[-2]:
        hint = ""
        if query.shape[-3] % key.shape[-3] == 0:
            hint = "; attend takes (batch, length, heads, head_dim), not (batch, heads, length, head_dim)"
        raise InputError(f"attend: query heads must be a multiple of key heads; got {shapes}{hint}")
    if not 0 <= dropout_rate < 1:
        raise InputError(f"attend: dropout_rate must be at least 0 and less than 1, not {dropout_rate}")


def _platform() -> str:
    """Return the target platform: that of the mesh's devices, which this host may not have."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.values["jax_default_device"]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _check_values(args: AttentionArgs) -> None:
    """Check that each named dimension of an array in mask or score is 1 or matches the scores."""
    b, t, h, _ = args.query.shape
    lengths = {"batch": b, "heads": h, "queries": t, "keys": args.key.shape[1]}

    def check(kind, x, dims):
        for name, n in zip(dims, jnp.shape(x), strict=True):
            if name in lengths and n not in (1, lengths[name]):
                raise InputError(
                    f"attend: an array {jnp.shape(x)} of ({', '.join(map(str, dims))}) in the {kind} "
                    f"has {n} {name}; the scores have {lengths[name]}"
                )
        return x

    for kind, value in (("mask", args.mask), ("score", args.score)):
        if value is not None:
            value.map_arrays(partial(check, kind))


def _run_sharded(name_or_backend: str | Backend, args: AttentionArgs) -> AttentionResult:
    """Run a backend on each device's shard, as the shardings in the arguments' types specify."""
    arrays = args.query, args.key, args.value
    layouts = [
        P(None, None, None, None) if jax.sharding.get_abstract_mesh().empty else _spec(x) for x in arrays
    ]
    mesh = jax.sharding.get_abstract_mesh()
    is_sharded = any(map(any, layouts))
    if not is_sharded and mesh.size <= 1:
        return select_backend(name_or_backend, args).run(args, (0, 0, 0, 0))
    batch, sequence, heads = _check_layouts(layouts, args.key.shape[2])
    sizes = mesh.shape

    def local_shape(x, spec):
        lengths = (
            n // math.prod(sizes[a] for a in _axes(axes)) for n, axes in zip(x.shape, spec, strict=True)
        )
        return jax.ShapeDtypeStruct(tuple(lengths), x.dtype)

    query, key, value = (local_shape(x, spec) for x, spec in zip(arrays, layouts, strict=True))
    sequence_shards = math.prod(sizes[a] for a in _axes(sequence))
    args = dataclasses.replace(
        args, sequence_axes=_axes(sequence), sequence_shards=sequence_shards, is_sharded=is_sharded
    )
    backend = select_backend(name_or_backend, dataclasses.replace(args, query=query, key=key, value=value))
    axes = {"batch": batch, "heads": heads}

    def spec(x, dims) -> P:
        # Shard batch and heads like the scores. Dimensions of 1 and the length are replicated.
        return P(*(axes.get(name) if n > 1 else None for name, n in zip(dims, jnp.shape(x), strict=True)))

    # Replicated constants stay constants: as arguments of `shard_map` they would be traced, and a
    # backend could not evaluate the mask at trace time.
    values = args.mask, args.score
    specs = jax.tree.leaves([x if x is None else x.map_arrays(spec) for x in values], is_leaf=_is_spec)
    leaves, structure = jax.tree.flatten(values)
    is_argument = [any(spec) or not _is_replicated_constant(x) for x, spec in zip(leaves, specs, strict=True)]
    specs = [spec for spec, keep in zip(specs, is_argument, strict=True) if keep]
    arguments = [x for x, keep in zip(leaves, is_argument, strict=True) if keep]
    constants = [np.asarray(x) for x, keep in zip(leaves, is_argument, strict=True) if not keep]
    sinks = None if args.sinks is None else jax.sharding.reshard(args.sinks, P(heads))

    def local(query, key, value, arguments, sinks, dropout_key):
        sources = iter(constants), iter(arguments)
        mask, score = structure.unflatten(next(sources[is_arg]) for is_arg in is_argument)
        offset = _shard_start(batch, query.shape[0]), _shard_start(heads, query.shape[2]), 0, 0
        local_args = dataclasses.replace(
            args,
            query=query,
            key=key,
            value=value,
            mask=mask,
            score=score,
            sinks=sinks,
            dropout_key=_local_key(dropout_key, (batch, heads)),
        )
        return tuple(backend.run(local_args, offset))

    weights = P(batch, heads, sequence, None) if args.return_weights else None
    result = jax.shard_map(
        local,
        in_specs=(*layouts, specs, P(heads), P()),
        out_specs=(P(batch, sequence, heads, None), P(batch, sequence, heads), weights),
        check_vma=False,
    )(*arrays, list(map(jax.sharding.reshard, arguments, specs)), sinks, args.dropout_key)
    return AttentionResult(*result)


def _is_spec(x) -> bool:
    return isinstance(x, P)


def _is_replicated_constant(x: Array | np.ndarray) -> bool:
    """Return whether an array is concrete at trace time, fully replicated, and not a random key."""
    if not is_static(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_replicated


def _axes(entry) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _shard_start(axes, length: int):
    """Return the offset of this device's shard in a dimension sharded over mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.axis_index(axes) * length if math.prod(sizes[a] for a in _axes(axes)) > 1 else 0


def _local_key(key, layout):
    """Return a dropout key that differs between shards of rows and heads.

    Devices that hold the same rows and heads use the same key, since replicas must be equal.
    """
    if key is None:
        return None
    for axes in layout:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def _spec(x) -> P:
    return jax.typeof(x).sharding.spec


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


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend and the cost of one call of `attend`.

    Attributes:
      backend: the name of the selected backend.
      rejected: maps the name of every other backend to the reason why it was not selected.
      block_sizes: `blockwise`'s default block_q and block_kv.
      blocks: numbers of empty, partial and full blocks. None for a traced mask.
      density: fraction of the pairs that the mask allows. None for a traced mask.
      flops: floating-point operations of the forward pass over the allowed pairs; a
        multiply-add counts as two.
      memory: temporary memory of the compiled forward pass, in bytes per device.
    """

    backend: str
    rejected: dict[str, str]
    block_sizes: tuple[int, int]
    blocks: tuple[int, int, int] | None
    density: float | None
    flops: float
    memory: int

    def __str__(self) -> str:
        lines = [f"backend   {self.backend}"]
        lines += [f"          not {name}: {reason}" for name, reason in self.rejected.items()]
        if self.blocks is None:
            lines.append("mask      traced: blocks are counted at run time")
        else:
            (q, kv), (empty, partial_, full) = self.block_sizes, self.blocks
            counts = f"{empty} empty, {partial_} partial, {full} full"
            lines.append(f"mask      {self.density:.2%} of the pairs")
            lines.append(f"blocks    of {q} queries and {kv} keys: {counts}")
        lines.append(f"FLOPs     {self.flops / 1e9:,.3f} G forward")
        lines.append(f"memory    {self.memory / 2**20:,.1f} MiB of temporaries, forward")
        return "\n".join(lines)


def explain(
    query, key, value, *, mask: Any = None, backend: str | Backend = "auto", **options
) -> Explanation:
    """Return which backend `attend` selects for these arguments, and the cost of the call.

    Args:
      query: as in `attend`, or a `jax.ShapeDtypeStruct`.
      key: as `query`.
      value: as `query`.
      mask: as in `attend`.
      backend: as in `attend`.
      **options: the other arguments of `attend`.

    Raises:
      InputError: `attend` raises it for these arguments.
    """
    recorder = _RecordingBackend(backend)

    def run(q, k, v):
        return attend(q, k, v, mask=mask, backend=recorder, **options)

    compiled = jax.jit(run).lower(query, key, value).compile()
    *batch, t, h, d = query.shape
    s, rows = key.shape[-3], int(np.prod(batch))
    block_sizes, blocks, density = default_block_sizes(t, s), None, None
    mask_ = None if mask is None else as_mask(mask)
    if mask_ is None or is_static(mask_):
        density = 1.0 if mask_ is None else mask_.density(t, s, rows, h)
        blocks = _count_blocks(mask_, BlockGrid(t, s, *block_sizes, rows, h))
    pairs = rows * h * t * s * (1.0 if density is None else density)
    return Explanation(
        backend=recorder.chosen.name,
        rejected=recorder.rejections(),
        block_sizes=block_sizes,
        blocks=blocks,
        density=density,
        flops=2.0 * pairs * (d + value.shape[-1]),
        memory=compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
    )


def _count_blocks(mask, grid: BlockGrid) -> tuple[int, int, int]:
    """Return the numbers of empty, partial and full blocks."""
    if mask is None:
        return 0, 0, int(np.prod(grid.num_blocks))
    any_allowed, all_allowed = (np.asarray(x) for x in mask.block_summary(grid))
    partial_blocks = any_allowed & ~all_allowed
    return int((~any_allowed).sum()), int(partial_blocks.sum()), int((any_allowed & all_allowed).sum())


class _RecordingBackend:
    """A backend that selects another one, runs it, and records the selection."""

    name = "recording"
    chosen: Backend
    args: AttentionArgs

    def __init__(self, name_or_backend: str | Backend):
        self._requested = name_or_backend

    def unsupported_reason(self, args):
        """Record the arguments and the backend selected for them."""
        self.args = args
        self.chosen = select_backend(self._requested, args)

    def run(self, args, offset):
        """Run the selected backend."""
        return self.chosen.run(args, offset)

    def rejections(self) -> dict[str, str]:
        """Return the reason why each other backend was not selected."""
        others = (backend for backend in BACKENDS if backend.name != self.chosen.name)
        is_auto = self._requested == "auto"
        unused = f"{self.chosen.name} has priority" if is_auto else "another backend was requested"
        return {backend.name: backend.unsupported_reason(self.args) or unused for backend in others}
