"""`attend`, one call for every attention in the project, and `explain`, which reports how it would run."""

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

# The order in which "auto" tries backends. `register` puts others before these.
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
    """Attention of `query` over `key` and `value` (Vaswani et al. 2017, equation 1), heads grouped if K < H.

    Args:
      query: (B, T, H, D), or with any number of batch dimensions.
      key: (B, S, K, D), H a multiple of K.
      value: (B, S, K, Dv).
      mask: which pairs may attend: a mask, a boolean array, or a function of (b, h, q, k); None is all.
      score: change of the scaled scores: a score, a function of (score, b, h, q, k), or several in order.
      scale: factor of the scores; None is 1 / sqrt(D).
      sinks: a further score of each head that takes weight and gives nothing, (H,).
      normalizer: masked scores to weights, over the last axis; only "reference" has others than softmax.
      dropout_rate: share of weights dropped, where `dropout_key` is given.
      dropout_key: random key of the dropout.
      backend: a name, a backend, or "auto": the first in `AUTO_ORDER` that supports the call; see `explain`.
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


def _check_shapes(query, key, value) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise InputError(f"attend takes (batch, length, heads, head_dim) arrays; got {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[:-3] != key.shape[:-3]:
        raise InputError(f"attend: batch, length and heads of key and value must agree; got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise InputError(f"attend: query and key must have one head_dim; got {shapes}")
    if query.shape[-2] % key.shape[-2]:
        hint = ""
        if query.shape[-3] % key.shape[-3] == 0:
            hint = (
                "; laid out (batch, heads, length, head_dim)? attend takes (batch, length, heads, head_dim)"
            )
        raise InputError(f"attend: query heads must be a multiple of key heads; got {shapes}{hint}")


def _platform() -> str:
    """The platform that the program is for: of the mesh's devices, which may be others than are here."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.values["jax_default_device"]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _check_values(args: AttentionArgs) -> None:
    """Checks that arrays within mask and score have the scores' lengths, or 1, where they say so."""
    b, t, h, _ = args.query.shape
    lengths = {"batch": b, "heads": h, "queries": t, "keys": args.key.shape[1]}

    def check(kind, x, dims):
        for name, n in zip(dims, jnp.shape(x), strict=True):
            if name in lengths and n not in (1, lengths[name]):
                raise InputError(
                    f"attend: an array {jnp.shape(x)} of ({', '.join(map(str, dims))}) in the {kind} "
                    f"has {n} {name}, where the scores have {lengths[name]}"
                )
        return x

    for kind, value in (("mask", args.mask), ("score", args.score)):
        if value is not None:
            value.map_arrays(partial(check, kind))


def _run_sharded(name_or_backend: str | Backend, args: AttentionArgs) -> AttentionResult:
    """Runs a backend on each device's own part, as the types of the arguments say."""
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
        # Cut as the scores are, but for what serves all rows or heads; whole along the length.
        return P(*(axes.get(name) if n > 1 else None for name, n in zip(dims, jnp.shape(x), strict=True)))

    # What is known now stays so: it does not become an argument, of which a backend would know nothing.
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
    """Whether an array is known, as a whole and as numbers, while the program is traced."""
    if not is_static(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_replicated


def _axes(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _shard_start(axes, length: int):
    """Where this device's part begins in a dimension that is laid out over mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.axis_index(axes) * length if math.prod(sizes[a] for a in _axes(axes)) > 1 else 0


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


def _spec(x) -> P:
    return jax.typeof(x).sharding.spec


def _check_layouts(layouts, kv_heads: int):
    """The mesh axes of batch, length and heads, once each device has all it needs of its rows."""
    query, key, value = layouts
    message = f"laid out are query {query}, key {key}, value {value}"
    if any(spec[3] for spec in layouts):
        raise InputError(f"attend: head_dim must be whole on every device, reshard first; {message}")
    # One key head serves every query head, wherever those lie.
    heads = (query[2],) if kv_heads > 1 else (query[2], None)
    if any(spec[:2] != query[:2] or spec[2] not in heads for spec in (key, value)):
        raise InputError(
            f"attend: batch, length and heads of key and value must be laid out as the query's, "
            f"reshard first; {message}"
        )
    return query[0], query[1], query[2]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call of `attend` comes to.

    Attributes:
      backend: the one that runs.
      rejected: why each other one does not, or that it is not needed.
      block_sizes: block_q and block_kv.
      blocks: how many blocks are empty, need the mask, and are full.
      density: share of the pairs that the mask allows; None where it holds traced arrays.
      flops: of the forward pass, for the allowed pairs; a multiply and an add are two.
      memory: bytes of temporary memory of the compiled forward pass on a device.
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
            lines.append("mask      known only when run")
        else:
            (q, kv), (empty, partly, full) = self.block_sizes, self.blocks
            counts = f"{empty} empty, {partly} partial, {full} full"
            lines.append(f"mask      {self.density:.2%} of the pairs")
            lines.append(f"blocks    of {q} queries and {kv} keys: {counts}")
        lines.append(f"FLOPs     {self.flops / 1e9:,.3f} G forward")
        lines.append(f"memory    {self.memory / 2**20:,.1f} MiB of temporaries, forward")
        return "\n".join(lines)


def explain(
    query, key, value, *, mask: Any = None, backend: str | Backend = "auto", **options
) -> Explanation:
    """What `attend` would do with these arguments; query, key and value may be shapes.

    Raises:
      InputError: what `attend` would raise.
    """
    recorder = _RecordingBackend(backend)

    def run(q, k, v):
        return attend(q, k, v, mask=mask, backend=recorder, **options)

    compiled = jax.jit(run).lower(query, key, value).compile()
    *batch, t, h, d = query.shape
    s, rows = key.shape[-3], int(np.prod(batch))
    block_sizes, blocks, density = default_block_sizes(t, s), None, None
    whole = None if mask is None else as_mask(mask)
    if whole is None or is_static(whole):
        density = 1.0 if whole is None else whole.density(t, s, rows, h)
        blocks = _count_blocks(whole, BlockGrid(t, s, *block_sizes, rows, h))
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
    """How many blocks are empty, partial and full."""
    if mask is None:
        return 0, 0, int(np.prod(grid.num_blocks))
    any_allowed, all_allowed = (np.asarray(x) for x in mask.block_summary(grid))
    partly = any_allowed & ~all_allowed
    return int((~any_allowed).sum()), int(partly.sum()), int((any_allowed & all_allowed).sum())


class _RecordingBackend:
    """Stands between `attend` and the backend that it would choose."""

    name = "recording"
    chosen: Backend
    args: AttentionArgs

    def __init__(self, name_or_backend: str | Backend):
        self._wanted = name_or_backend

    def unsupported_reason(self, args):
        """Keeps what is asked."""
        self.args = args
        self.chosen = select_backend(self._wanted, args)

    def run(self, args, offset):
        """Runs the backend that was chosen."""
        return self.chosen.run(args, offset)

    def rejections(self) -> dict[str, str]:
        """Why each other backend was not chosen."""
        others = (backend for backend in BACKENDS if backend.name != self.chosen.name)
        unused = f"{self.chosen.name} comes first" if self._wanted == "auto" else "another was asked for"
        return {backend.name: backend.unsupported_reason(self.args) or unused for backend in others}
