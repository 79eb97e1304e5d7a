"""Backends: the `Backend` protocol, its arguments and results, the registry and the selection."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnlab.attention.arrays import varying_axes, wide
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.dropout import AttentionDropout
from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import zero_padding
from attnlab.attention.masks.dense import zero_masked
from attnlab.attention.normalizers import softmax
from attnlab.attention.pairwise import BlockOffset
from attnlab.attention.scores import Score
from attnlab.errors import InputError


@dataclass(frozen=True)
class AttentionArgs:
    """Arguments of a backend: those of `attend`, for the shard of one device.

    Attributes:
      query: this device's shard, (B, T, H, D). `Backend.unsupported_reason` may get a
        `jax.ShapeDtypeStruct` for query, key and value.
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: the pairs that may attend. None allows every pair.
      score: modifies the scaled scores.
      scale: factor of the scores.
      sinks: one extra logit per head, (H,).
      normalizer: maps masked scores to weights.
      dropout: drops weights after the normalizer; None for no dropout.
      block_mask: the blocks of the mask, if they are known.
      return_weights: whether to return the weights.
      return_lse: whether to return the log-sum-exp. If False, `AttentionResult.lse` is undefined.
      platform: "cpu", "tpu" or "gpu".
      sequence_axes: the mesh axes that the length is sharded over.
      sequence_shards: number of shards of the length.
      is_sharded: whether rows, heads or the length are sharded over devices.
      auto_axes: mesh axes over which the compiler may shard the arrays, which types do not show.
    """

    query: Array
    key: Array
    value: Array
    mask: Mask | None = None
    score: Score | None = None
    scale: float = 1.0
    sinks: Float[Array, " H"] | None = None
    normalizer: Callable = softmax
    dropout: AttentionDropout | None = None
    block_mask: BlockMask | None = None
    return_weights: bool = False
    return_lse: bool = False
    platform: str = "cpu"
    sequence_axes: tuple[str, ...] = ()
    sequence_shards: int = 1
    is_sharded: bool = False
    auto_axes: tuple[str, ...] = ()

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        """Shape of the scores, (B, H, T, S)."""
        b, t, h, _ = self.query.shape
        return b, h, t, self.key.shape[1]


class AttentionResult(NamedTuple):
    """Output (B, T, H, Dv), log-sum-exp (B, T, H) and, if requested, weights (B, H, T, S)."""

    out: Array
    lse: Array
    weights: Array | None = None


@runtime_checkable
class Backend(Protocol):
    """An implementation of attention that `attend` can select.

    A backend that visits the blocks of a `BlockMask` also has a method `block_sizes(args)` that
    returns the block_q and block_kv it prefers, or None if it would not use a block mask. One that
    runs another backend on parts of the arrays has a method `local_kernel(args)` that returns its
    name, and maps the names of others to the reason why it does not run them.
    """

    name: str

    def unsupported_reason(self, args: AttentionArgs) -> str | None:
        """Return why the backend does not support the arguments, or None if it does."""
        ...

    def run(self, args: AttentionArgs, offset: BlockOffset) -> AttentionResult:
        """Compute attention of one device's shard.

        Args:
          args: the arguments, with the arrays of the shard.
          offset: indices of the shard's first batch row, head, query and key.
        """
        ...


def block_sizes(backend: Backend, args: AttentionArgs) -> tuple[int, int] | None:
    """Return the block sizes that a backend prefers; None if it uses no block mask."""
    method = getattr(backend, "block_sizes", None)
    return None if method is None else method(args)


def sharded_length_reason(args: AttentionArgs) -> str | None:
    """Return why a backend that does not support a sharded length cannot run, or None."""
    return f"the length is sharded over {', '.join(args.sequence_axes)}" if args.sequence_axes else None


def softmax_only_reason(args: AttentionArgs, dropout: bool = False) -> str | None:
    """Return why a backend that supports only softmax and keeps no weights cannot run, or None.

    `dropout` is whether the backend supports dropout. Such backends also need lengths that are
    numbers: only "reference" runs under `jax.export` with symbolic dimensions.
    """
    if any(not isinstance(n, int) for n in args.score_shape):
        return f"it needs lengths that are numbers, not the symbolic scores {args.score_shape}"
    if args.dropout is not None and not dropout:
        return "it does not support dropout"
    if args.return_weights:
        return "it does not materialize the weights, which return_weights needs"
    return None if args.normalizer is softmax else "it supports only the softmax normalizer"


def kernel_mesh_reason(args: AttentionArgs) -> str | None:
    """Return why a kernel that is opaque to the compiler cannot run on the mesh, or None."""
    if args.auto_axes:
        axes = ", ".join(args.auto_axes)
        return f"the compiler cannot partition its kernel over the Auto mesh axes {axes}; use Explicit axes"
    if varying_axes((args.query, args.key, args.value)):
        return "its kernel does not support the check of jax.shard_map; pass check_vma=False"
    return None


# All backends, in the order in which "auto" tries them. `attend.AUTO_ORDER` fills the list.
BACKENDS: list[Backend] = []

# Backends in plain JAX, which every compiler accepts. On an accelerator they are the slow path.
PLAIN_JAX = ("decode", "blockwise", "blockwise_autodiff", "reference")

# Names that "auto" skips, with reasons. `jax.jit` traces again where this value differs.
_excluded = jax.make_user_context(())
# Whether only shapes are needed, see `only_shapes`.
_only_shapes = jax.make_user_context(False)


def register(backend: Backend, before: str | None = None) -> None:
    """Add a backend that "auto" tries before the one named `before`, or before all others.

    Raises:
      ValueError: A backend of this name is already registered.
    """
    names = [existing.name for existing in BACKENDS]
    if backend.name in (*names, "auto"):
        raise ValueError(f"a backend named {backend.name!r} is already registered")
    BACKENDS.insert(0 if before is None else names.index(before), backend)


def exclude_backends(*names: str, **reasons: str) -> AbstractContextManager:
    """Return a context in which "auto" skips these backends, in programs of `jax.jit` too.

    Args:
      names: names of backends, such as one that the compiler refuses.
      reasons: names of backends, with the reason that `explain` reports.

    Raises:
      InputError: no backend has one of the names.
    """
    added = dict.fromkeys(names, "exclude_backends excludes it") | reasons
    known = [backend.name for backend in BACKENDS]
    for name in added:
        if name not in known:
            raise InputError(f"exclude_backends: no backend {name!r}; there are {', '.join(known)}")
    return _excluded((*_excluded.value, *added.items()))


@dataclass(frozen=True)
class Selection:
    """The backend that one call of `attend` runs on one platform.

    Attributes:
      backend: the name of the backend.
      platform: "cpu", "tpu" or "gpu".
      refusals: maps the name of each backend that does not support the call to the reason.
      kernel: the name of the backend that runs on parts of the arrays; None if there is none.
      query: shape of one device's queries, (B, T, H, D).
      keys: shape of one device's keys, (B, S, K, D).
    """

    backend: str
    platform: str
    refusals: dict[str, str]
    query: tuple[int, ...]
    keys: tuple[int, ...]
    kernel: str | None = None

    def __str__(self) -> str:
        return f"{self.backend} ({self.kernel})" if self.kernel else self.backend


_recorders: ContextVar[tuple[Callable[[Selection], None], ...]] = ContextVar("recorders", default=())


@contextmanager
def record_selections(record: Callable[[Selection], None]) -> Iterator[None]:
    """Call `record` with the selection of each call of `attend` that is traced in this context."""
    token = _recorders.set((*_recorders.get(), record))
    try:
        yield
    finally:
        _recorders.reset(token)


def only_shapes() -> AbstractContextManager:
    """Let every backend return zeros in this context, for `jax.eval_shape`.

    The libraries of a kernel's platform may then be absent.
    """
    return _only_shapes(True)


def zero_result(args: AttentionArgs) -> AttentionResult:
    """Return zeros of the shapes of a backend's result."""
    rows = args.query.shape[:3]
    out = jnp.zeros((*rows, args.value.shape[-1]), args.value.dtype)
    lse = jnp.zeros(rows, wide(args.query))
    return AttentionResult(out, lse, jnp.zeros(args.score_shape, lse.dtype) if args.return_weights else None)


def needs_only_shapes() -> bool:
    """Return whether the program is traced within `only_shapes`."""
    return _only_shapes.value


def report_selection(backend: Backend, args: AttentionArgs) -> None:
    """Pass the selection of `backend` for these arguments to `record_selections`."""
    if not _recorders.get():
        return
    refusals = {other.name: refusal(other, args) for other in BACKENDS if other is not backend}
    local_kernel = getattr(backend, "local_kernel", None)
    kernel, kernel_refusals = (None, {}) if local_kernel is None else local_kernel(args)
    selection = Selection(
        backend=backend.name,
        platform=args.platform,
        refusals={name: reason for name, reason in refusals.items() if reason} | kernel_refusals,
        query=args.query.shape,
        keys=args.key.shape,
        kernel=kernel,
    )
    for record in _recorders.get():
        record(selection)


def refusal(backend: Backend, args: AttentionArgs) -> str | None:
    """Return why "auto" skips a backend, or None."""
    return dict(_excluded.value).get(backend.name) or backend.unsupported_reason(args)


def select_backend(name_or_backend: str | Backend, args: AttentionArgs) -> Backend:
    """Return the named backend, or for "auto" the first that supports these arguments.

    Raises:
      InputError: This is neither a name nor a backend, no backend has this name, or the backend
        does not support the arguments.
    """
    if not isinstance(name_or_backend, str | Backend):
        raise InputError(f"attend: backend must be a name or a Backend, not {name_or_backend!r}")
    by_name = {backend.name: backend for backend in BACKENDS}
    if name_or_backend == "auto":
        reasons = {}
        for backend in BACKENDS:
            reason = refusal(backend, args)
            if reason is None:
                return backend
            reasons[backend.name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise InputError(f"attend: no backend supports these arguments: {listed}")
    if isinstance(name_or_backend, str) and name_or_backend not in by_name:
        raise InputError(
            f"attend: unknown backend {name_or_backend!r}, not one of auto, {', '.join(by_name)}"
        )
    backend = by_name[name_or_backend] if isinstance(name_or_backend, str) else name_or_backend
    if reason := backend.unsupported_reason(args):
        raise InputError(f"attend: backend {backend.name!r} does not support these arguments: {reason}")
    return backend


def select_backends(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> dict[str, Backend]:
    """Return the selected backend of each platform; of one platform if the backend is requested."""
    candidates = {platform: replace(args, platform=platform) for platform in platforms}
    if name_or_backend == "auto":
        return {platform: select_backend("auto", x) for platform, x in candidates.items()}
    # The requested backend runs on one of the platforms: take the first that it supports.
    supported = (p for p, x in candidates.items() if _is_supported(name_or_backend, x))
    platform = next(supported, platforms[0])
    return {platform: select_backend(name_or_backend, candidates[platform])}


def _is_supported(name_or_backend: str | Backend, args: AttentionArgs) -> bool:
    try:
        select_backend(name_or_backend, args)
    except InputError:
        return False
    return True


def target_platforms(arrays: Sequence[Array]) -> tuple[str, ...]:
    """Return the platforms that may run a call with these arrays: "cpu", "gpu" or "tpu".

    It is the platform of the mesh, else of the device that an array is committed to, else of the
    default device. A function under `jax.jit` does not see where its arguments are: they may be on
    any platform of the process, most likely the default one, which comes first.
    """
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    if mesh_device is not None:
        return (_platform_name(mesh_device),)
    concrete = [x for x in map(_concrete_value, arrays) if not isinstance(x, jax.core.Tracer)]
    placed = [x for x in concrete if getattr(x, "sharding", None) is not None]
    committed = [x for x in placed if getattr(x, "committed", True)]  # as is the shape of an array
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # defined at run time
    if committed or (placed and default is None):
        return (_platform_name(next(iter((committed or placed)[0].sharding.device_set))),)
    first = _platform_name(default or jax.default_backend())
    if len(concrete) == len(arrays):
        return (first,)
    others = [x for x in (_platform_name(jax.default_backend()), "cpu") if _has_devices(x)]
    return tuple(dict.fromkeys([first] * (default is not None) + others)) or (first,)


def _concrete_value(x: Any) -> Any:
    """Return the array in a tracer of `jax.grad` or `jax.vmap`, or the tracer of a `jax.jit`."""
    while isinstance(x, jax.core.Tracer):
        inner = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(inner, jax.Array | np.ndarray):
            break
        x = inner
    return x


def _has_devices(platform: str) -> bool:
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


def _platform_name(device: Any) -> str:
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def with_zeroed(args: AttentionArgs, allowed: Bool[Array, "b h t s"] | None = None) -> AttentionArgs:
    """Return the arguments with zeros by `zero_masked`, or without `allowed` by `zero_padding`."""
    arrays = args.query, args.key, args.value
    query, key, value = zero_padding(args.mask, *arrays) if allowed is None else zero_masked(allowed, *arrays)
    return replace(args, query=query, key=key, value=value)


def apply_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Add attention sinks to an output and its log-sum-exp.

    A sink is one extra logit per head that takes part in the softmax and has no value (gpt-oss,
    arXiv 2508.10925, section 2.2). Xiao et al. 2023, arXiv 2309.17453, equation 2, is a sink of 0.
    """
    sink = sinks.astype(lse.dtype)[None, None, :]
    # A row without keys has lse -inf, which is replaced so that the difference is never inf - inf.
    finite_lse = jnp.where(jnp.isneginf(lse), sink - 1e4, lse)
    share = jax.nn.sigmoid(finite_lse - sink)
    return (out * share[..., None]).astype(out.dtype), jnp.logaddexp(finite_lse, sink)
