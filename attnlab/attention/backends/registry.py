"""The `Backend` protocol, the arguments and results of a backend, and the registry of backends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.normalizers import softmax
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
      dropout_rate: fraction of the weights to drop; 0 for no dropout.
      dropout_key: random key of the dropout.
      return_weights: whether to return the weights.
      return_lse: whether to return the log-sum-exp. If False, `AttentionResult.lse` is undefined.
      platform: "cpu", "tpu" or "gpu".
      sequence_axes: the mesh axes that the length is sharded over.
      sequence_shards: number of shards of the length.
      is_sharded: whether rows, heads or the length are sharded over devices.
    """

    query: Array
    key: Array
    value: Array
    mask: Mask | None = None
    score: Score | None = None
    scale: float = 1.0
    sinks: Float[Array, " H"] | None = None
    normalizer: Callable = softmax
    dropout_rate: float = 0.0
    dropout_key: Array | None = None
    return_weights: bool = False
    return_lse: bool = False
    platform: str = "cpu"
    sequence_axes: tuple[str, ...] = ()
    sequence_shards: int = 1
    is_sharded: bool = False

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
    """An implementation of attention that `attend` can select."""

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


def sharded_length_reason(args: AttentionArgs) -> str | None:
    """Return why a backend that does not support a sharded length cannot run, or None."""
    return f"the length is sharded over {', '.join(args.sequence_axes)}" if args.sequence_axes else None


def softmax_only_reason(args: AttentionArgs) -> str | None:
    """Return why a backend that supports only softmax and keeps no weights cannot run, or None."""
    if args.dropout_rate:
        return "it does not materialize the weights, which dropout needs"
    if args.return_weights:
        return "it does not materialize the weights, which return_weights needs"
    return None if args.normalizer is softmax else "it supports only the softmax normalizer"


# All backends, in the order in which "auto" tries them. `attend.AUTO_ORDER` fills the list.
BACKENDS: list[Backend] = []


def register(backend: Backend, before: str | None = None) -> None:
    """Add a backend that "auto" tries before the one named `before`, or before all others.

    Raises:
      ValueError: A backend of this name is already registered.
    """
    names = [existing.name for existing in BACKENDS]
    if backend.name in (*names, "auto"):
        raise ValueError(f"a backend named {backend.name!r} is already registered")
    BACKENDS.insert(0 if before is None else names.index(before), backend)


def select_backend(name_or_backend: str | Backend, args: AttentionArgs) -> Backend:
    """Return the named backend, or for "auto" the first that supports these arguments.

    Raises:
      InputError: No backend has this name, or the backend does not support the arguments.
    """
    by_name = {backend.name: backend for backend in BACKENDS}
    if name_or_backend == "auto":
        reasons = {}
        for backend in BACKENDS:
            reason = backend.unsupported_reason(args)
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


def apply_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Add attention sinks to an output and its log-sum-exp.

    A sink is one extra logit per head that takes part in the softmax and has no value (gpt-oss,
    arXiv 2508.10925, section 2.2). Xiao et al. 2023, arXiv 2309.17453, equation 2, is a sink of 0.
    """
    sink = sinks.astype(lse.dtype)[None, None, :]
    # A row without keys has lse -inf, which is replaced so that the difference is never inf - inf.
    finite_lse = jnp.where(jnp.isneginf(lse), sink - 1e4, lse)
    share = jax.nn.sigmoid(finite_lse - sink)
    return out * share[..., None].astype(out.dtype), jnp.logaddexp(finite_lse, sink)
