"""The attention call `attend`, from its arguments to the backend, and `prepare` for block masks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from attnlab.attention.arrays import (
    check_array,
    check_arrays,
    check_number,
    check_options,
    describe,
    is_array,
)
from attnlab.attention.backends.blockwise import Blockwise
from attnlab.attention.backends.blockwise_autodiff import BlockwiseAutodiff
from attnlab.attention.backends.cudnn import Cudnn
from attnlab.attention.backends.decode import Decode
from attnlab.attention.backends.flash import Flash
from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import (
    BACKENDS,
    PLAIN_JAX,
    AttentionArgs,
    AttentionResult,
    Backend,
    block_sizes,
    needs_only_shapes,
    report_selection,
    select_backends,
    target_platforms,
    zero_result,
)
from attnlab.attention.backends.splash import Splash
from attnlab.attention.backends.tokamax import Tokamax
from attnlab.attention.block_mask import BlockMask, make_block_mask
from attnlab.attention.context_parallel import AllGather, AllToAll
from attnlab.attention.dropout import AttentionDropout, HashDropout, MaskDropout
from attnlab.attention.fallback import kernel_scope
from attnlab.attention.masks.base import Mask, PerHeadMask, as_mask
from attnlab.attention.masks.basic import depends_on_batch_and_heads, is_static
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import BlockGrid, BlockOffset, PairwiseFn
from attnlab.attention.ring import Ring
from attnlab.attention.scores import as_score
from attnlab.attention.sharded import local_args, prepare_shards, run_shards, with_mesh
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
    dropout_mask: Bool[Array, "#B #H #T #S"] | None = None,
    deterministic: bool = False,
    broadcast_dropout: bool = False,
    block_mask: Any = None,
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
      normalizer: maps masked scores to weights. Backends but "reference" require `softmax`.
      dropout_rate: fraction of the weights to drop. It needs a key or a mask.
      dropout_key: random key of the dropout. All backends and meshes drop the same pairs.
      dropout_mask: the pairs to keep.
      deterministic: True for no dropout.
      broadcast_dropout: whether all batch rows and heads drop the same pairs of a `dropout_key`.
      block_mask: the `BlockMask` of `mask`, from `prepare`, if several calls share it. Backends
        that use none ignore it.
      backend: a name, a `Backend`, or "auto": the first backend in order that supports the call.
        `explain` returns the selected backend and the reasons against the others.
      return_lse: also return the log-sum-exp of the scores, (B, T, H), float32.
      return_weights: also return the weights before dropout, (B, H, T, S), float32.

    Returns:
      The output (B, T, H, Dv) in the dtype of `value`, sharded like `query`; then, if requested,
      the log-sum-exp and the weights. A query without keys has output 0 and log-sum-exp -inf.

    Raises:
      InputError: A dtype, shape or sharding does not match, a mask is not boolean, dropout has no
        key, or the backend is unknown or unsupported.
    """
    check_arrays(query, key, value)
    args = make_args(
        *(query, key, value),
        mask=mask,
        score=score,
        scale=scale,
        sinks=sinks,
        normalizer=normalizer,
        dropout=make_dropout(dropout_rate, dropout_key, dropout_mask, deterministic, broadcast_dropout),
        block_mask=block_mask,
        return_weights=return_weights,
        return_lse=return_lse,
    )
    batch, platforms = query.shape[:-3], target_platforms((query, key, value))
    result = _run_compiled(backend, args, platforms)
    out, lse, weights = (x if x is None else _restore_batch(x, batch) for x in result)
    extras = [lse] * return_lse + [weights] * return_weights
    return (out, *extras) if extras else out


# Fields of `AttentionArgs` that hold arrays, or masks and scores with arrays.
_ARRAYS = ("query", "key", "value", "mask", "score", "scale", "sinks", "dropout", "block_mask")


def _run_compiled(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> AttentionResult:
    """Return `_run(...)`, compiled unless a caller traces it into a program of its own.

    Python numbers, such as the offset of a mask, are constants of the program. Arrays are its
    arguments. A backend that loops over blocks would otherwise compile its loops in every call.
    """
    values = {name: getattr(args, name) for name in _ARRAYS}
    leaves, structure = jax.tree.flatten(values)
    numbers = tuple((type(x), x) if isinstance(x, int | float) else None for x in leaves)
    others = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in _ARRAYS}
    # The choice of "auto" depends on the registered backends.
    key = structure, numbers, tuple(others.items()), name_or_backend, tuple(platforms), tuple(BACKENDS)
    if _is_traced() or not _is_hashable(key):
        return _run(name_or_backend, args, platforms)
    return _run_program(key, [x for x, number in zip(leaves, numbers, strict=True) if number is None])


@partial(jax.jit, static_argnums=0)
def _run_program(key, arrays: list[Any]) -> AttentionResult:
    structure, numbers, others, name_or_backend, platforms, _ = key
    remaining = iter(arrays)
    leaves = [next(remaining) if number is None else number[1] for number in numbers]
    args = AttentionArgs(**structure.unflatten(leaves), **dict(others))
    return _run(name_or_backend, args, platforms)


def _is_traced() -> bool:
    """Return whether operations on constants are traced, as by `jax.jit` but not by `jax.grad`."""
    return isinstance(jax.lax.full((), np.float32(0)), jax.core.Tracer)


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _run(name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]) -> AttentionResult:
    """Run a backend on each device's shard, as the shardings in the arguments' types specify.

    Types contain only the shardings over Explicit axes. Over Auto axes, the compiler shards the
    operations of the backend like their operands.
    """
    args, layouts = _with_mesh(args)
    if layouts is None:
        return _select_run(name_or_backend, args, platforms)(args, (0, 0, 0, 0))
    run = _select_run(name_or_backend, local_args(args, layouts), platforms)
    return run_shards(run, args, layouts)


def _with_mesh(args: AttentionArgs) -> tuple[AttentionArgs, list[P] | None]:
    """Return the result of `with_mesh`, or the arguments themselves if there is no mesh."""
    return (args, None) if jax.sharding.get_abstract_mesh().empty else with_mesh(args)


def _select_run(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> Callable[[AttentionArgs, BlockOffset], AttentionResult]:
    """Return `run` of the selected backend.

    If "auto" selects different backends on these platforms, the compiler takes that of the platform
    it compiles for.
    """
    backends = select_backends(name_or_backend, args, platforms)

    for platform, backend in backends.items():
        report_selection(backend, dataclasses.replace(args, platform=platform))

    def run(args, offset):
        if needs_only_shapes():
            return zero_result(args)
        if 0 in args.score_shape:  # other backends do not support empty arrays
            return Reference().run(args, offset)
        runs = {
            platform: partial(_run_backend, backend, dataclasses.replace(args, platform=platform), offset)
            for platform, backend in backends.items()
        }
        default = runs.pop(next(iter(runs)))
        if len({id(backend) for backend in backends.values()}) == 1:
            return default()
        if "gpu" in runs:  # the compiler's names of its two platforms
            runs["cuda"] = runs["rocm"] = runs.pop("gpu")
        return jax.lax.platform_dependent(default=default, **runs)

    return run


def _run_backend(backend: Backend, args: AttentionArgs, offset: BlockOffset) -> AttentionResult:
    """Run a backend. The compiler's errors about a kernel contain the name of this scope."""
    if backend.name in PLAIN_JAX:
        return backend.run(args, offset)
    with jax.named_scope(kernel_scope(backend.name)):
        return backend.run(args, offset)


def make_args(query, key, value, *, mask, score, scale, normalizer, **options) -> AttentionArgs:
    """Return the arguments of a backend for those of `attend`; query, key and value are checked."""
    check_options(scale, normalizer)
    args = AttentionArgs(
        *map(_flatten_batch, (query, key, value)),
        mask=mask if isinstance(mask, Mask | None) else as_mask(mask),
        score=None if score is None else as_score(score),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        normalizer=normalizer,
        **options,
    )
    return check_values(args)


def _flatten_batch(x: Any) -> Any:
    """Return an array with one batch dimension."""
    if isinstance(x, jax.ShapeDtypeStruct) and x.ndim == 4:
        return x
    return jnp.asarray(x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]))


def _restore_batch(x: Array, batch: tuple) -> Array:
    """Return an array with the batch dimensions that `_flatten_batch` joined.

    They are symbolic under `jax.export` with symbolic dimensions.
    """
    return x if len(batch) == 1 else x.reshape(*batch, *x.shape[1:])


# Fields without a meaning if there is no pair.
_NO_PAIRS: dict[str, Any] = {"mask": None, "score": None, "dropout": None, "block_mask": None}


def make_dropout(
    rate: Any, key: Any, mask: Any, deterministic: Any, broadcast: Any
) -> AttentionDropout | None:
    """Return the dropout that the arguments of `attend` describe.

    Raises:
      InputError: a value is of the wrong type or out of range, or dropout has neither a key nor a
        mask, or both.
    """
    for name, flag in (("deterministic", deterministic), ("broadcast_dropout", broadcast)):
        if not isinstance(flag, bool | np.bool_):
            raise InputError(f"attend: {name} must be True or False, not {describe(flag)}")
    check_number("attend", dropout_rate=rate)
    if not 0 <= rate < 1:
        raise InputError(f"attend: dropout_rate must be at least 0 and less than 1, not {rate}")
    if key is not None and not _is_random_key(key):
        raise InputError(
            f"attend: dropout_key must be a key of jax.random, as jax.random.key(0); not {describe(key)}"
        )
    if mask is not None:
        check_array("attend: dropout_mask", mask, "boolean", 4)
    if not rate or deterministic:
        return None
    if key is None and mask is None:
        raise InputError(
            f"attend: dropout_rate {rate} needs a dropout_key; pass deterministic=True for no dropout"
        )
    if key is not None and mask is not None:
        raise InputError("attend: pass dropout_key or dropout_mask, not both")
    return HashDropout.from_key(rate, key, broadcast) if mask is None else MaskDropout(float(rate), mask)


def _is_random_key(x: Any) -> bool:
    if not is_array(x):
        return False
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype == np.uint32


def check_values(args: AttentionArgs) -> AttentionArgs:
    """Check the sizes of the arrays in mask, score and sinks against the scores.

    Returns:
      The arguments; without mask, score and dropout if an array is empty, so that there is no pair.

    Raises:
      InputError: a named dimension is neither 1 nor that of the scores, `per_head` or the sinks do
        not have one entry per query head, or the block mask is for other lengths.
    """
    b, h, t, s = args.score_shape
    lengths = {"batch": b, "heads": h, "queries": t, "keys": s}

    def check(kind, x, dims):
        for name, n in zip(dims, jnp.shape(x), strict=True):
            if name in lengths and n not in (1, lengths[name]):
                raise InputError(
                    f"attend: an array {jnp.shape(x)} of ({', '.join(map(str, dims))}) in the {kind} "
                    f"has {n} {name}; the scores have {lengths[name]}"
                )
        return x

    for kind, value in (("mask", args.mask), ("score", args.score), ("dropout", args.dropout)):
        if value is not None:
            value.map_arrays(partial(check, kind))
            for part in value.walk():
                _check_mask_of_head(part, h)
    if args.sinks is not None:
        check_array("attend: sinks", args.sinks, "floating", 1)
        if args.sinks.shape[0] != h:
            raise InputError(f"attend: sinks must have one logit per query head, {h}; got {args.sinks.shape}")
    if args.block_mask is not None:
        _check_block_mask(args.block_mask, args.score_shape)
    is_empty = 0 in args.score_shape
    return dataclasses.replace(args, **_NO_PAIRS) if is_empty else args


def _check_block_mask(block_mask: Any, score_shape: tuple[int, ...]) -> None:
    if not isinstance(block_mask, BlockMask):
        raise InputError(f"attend: block_mask must be a BlockMask of prepare, not {describe(block_mask)}")
    b, h, t, s = score_shape
    lengths = block_mask.q_length, block_mask.kv_length
    if lengths != (t, s):
        raise InputError(f"attend: block_mask is for {lengths} queries and keys; the scores have {(t, s)}")
    groups = block_mask.num_lists
    if any(count > 1 and n % count for n, count in zip((b, h), groups, strict=True)):
        raise InputError(
            f"attend: block_mask has lists of {groups} rows and heads, which do not divide the {(b, h)} of "
            "the scores"
        )


def _check_mask_of_head(part: PairwiseFn, heads: int) -> None:
    if isinstance(part, PerHeadMask) and len(part.mask_of_head) != heads:
        raise InputError(
            f"attend: per_head got {len(part.mask_of_head)} masks for {heads} query heads; pass one per head"
        )


def prepare(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score: Any = None,
    backend: str | Backend = "auto",
    **options: Any,
) -> BlockMask | None:
    """Return the block mask of calls of `attend` with these arguments, to pass as `block_mask=`.

    The backend is selected as in `attend`, and selects the sizes of the blocks. Static masks are
    evaluated at trace time. Over Explicit mesh axes, each device computes the blocks of its batch
    rows, heads and queries.

    Args:
      query: (B, T, H, D), an array or a `jax.ShapeDtypeStruct` with its sharding.
      key: (B, S, K, D), likewise.
      value: (B, S, K, Dv), likewise.
      mask: as in `attend`.
      score: as in `attend`.
      backend: as in `attend`.
      **options: other fields of `AttentionArgs`, on which the selection may depend.

    Returns:
      The block mask; None if the backend uses none, or the length is sharded into parts that no
      block size divides.

    Raises:
      InputError: as `attend`.
    """
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in (query, key, value)):
        check_arrays(query, key, value)
    fields = {"scale": None, "normalizer": softmax} | options
    args = make_args(query, key, value, mask=mask, score=score, **fields)
    if 0 in args.score_shape:
        return None
    args, layouts = _with_mesh(args)
    shard = args if layouts is None else local_args(args, layouts)
    platforms = target_platforms((query, key, value))
    sizes = _block_sizes(backend, shard, platforms)
    if sizes is None:
        return None
    if layouts is None or (not args.sequence_axes and _is_same_on_all_devices(args.mask)):
        # Of the heads of one device, so that all devices decide alike which lists are shared.
        b, h, t, s = shard.score_shape
        return make_block_mask(args.mask, BlockGrid(t, s, *sizes, b, h))
    return prepare_shards(args, layouts, sizes)


def _block_sizes(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> tuple[int, int] | None:
    """Return the block sizes of the first platform whose backend uses a block mask."""
    backends = select_backends(name_or_backend, args, platforms)
    sizes = (
        block_sizes(backend, dataclasses.replace(args, platform=platform))
        for platform, backend in backends.items()
    )
    return next((x for x in sizes if x is not None), None)


def _is_same_on_all_devices(mask) -> bool:
    return mask is None or (is_static(mask) and not any(depends_on_batch_and_heads(mask)))
