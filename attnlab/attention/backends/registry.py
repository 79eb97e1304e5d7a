"""The backend protocol, the arguments a backend gets, and the registry in order of preference."""

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
    """What a call of `attend` asks for.

    Attributes:
      query: (B, T, H, D), a device's part; where a backend may refuse, only its shape.
      key: (B, S, K, D).
      value: (B, S, K, Dv).
      mask: which pairs may attend; None is all.
      score: change of the scaled scores.
      scale: factor of the scores.
      sinks: a further score of each head, (H,).
      normalizer: masked scores to weights.
      dropout_rate: share of weights dropped; 0 where none are.
      dropout_key: its random key.
      return_weights: whether the weights are to be returned.
      return_lse: whether the log-sum-exp is; where it is not, what a backend returns for it means nothing.
      platform: "cpu", "tpu", "gpu".
      sequence_axes: the mesh axes that the length is sharded over.
      sequence_shards: how many parts that makes.
      is_sharded: whether other devices hold other rows, heads or parts of the length.
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
        """The shape of the scores, (B, H, T, S)."""
        b, t, h, _ = self.query.shape
        return b, h, t, self.key.shape[1]


class AttentionResult(NamedTuple):
    """The output (B, T, H, Dv), the log-sum-exp (B, T, H), and the weights (B, H, T, S) if asked for."""

    out: Array
    lse: Array
    weights: Array | None = None


@runtime_checkable
class Backend(Protocol):
    """A way to compute attention."""

    name: str

    def unsupported_reason(self, args: AttentionArgs) -> str | None:
        """Why it cannot do what is asked; None where it can."""
        ...

    def run(self, args: AttentionArgs, offset: BlockOffset) -> AttentionResult:
        """The result for one device's part, whose batch row, head, query and key count from `offset`."""
        ...


def sharded_length_reason(args: AttentionArgs) -> str | None:
    """Why a backend that needs the whole length on a device cannot do what is asked."""
    return f"the length is sharded over {', '.join(args.sequence_axes)}" if args.sequence_axes else None


def softmax_only_reason(args: AttentionArgs) -> str | None:
    """Why a backend that normalises by softmax, and never holds the weights, cannot do what is asked."""
    if args.dropout_rate:
        return "it never holds the weights, which dropout changes"
    if args.return_weights:
        return "it never holds the weights, which return_weights asks for"
    return None if args.normalizer is softmax else "it normalises by softmax alone"


# All backends in the order in which "auto" tries them; `attend.AUTO_ORDER` fills it.
BACKENDS: list[Backend] = []


def register(backend: Backend, before: str | None = None) -> None:
    """Adds a backend, preferred to the one named `before`; None is to all.

    Raises:
      ValueError: there is one of this name.
    """
    names = [existing.name for existing in BACKENDS]
    if backend.name in (*names, "auto"):
        raise ValueError(f"there is a backend named {backend.name!r}")
    BACKENDS.insert(0 if before is None else names.index(before), backend)


def select_backend(name_or_backend: str | Backend, args: AttentionArgs) -> Backend:
    """Return the named backend, or for "auto" the first that supports these arguments.

    Raises:
      InputError: no backend has this name, or it does not support the arguments.
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
        raise InputError(f"attend: no backend can do this: {listed}")
    if isinstance(name_or_backend, str) and name_or_backend not in by_name:
        raise InputError(f"attend: unknown backend {name_or_backend!r}; there are auto, {', '.join(by_name)}")
    backend = by_name[name_or_backend] if isinstance(name_or_backend, str) else name_or_backend
    if reason := backend.unsupported_reason(args):
        raise InputError(f"attend: backend {backend.name!r} cannot do this: {reason}")
    return backend


def apply_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The result with one more score in every row, which takes its share of the weight and gives nothing.

    (gpt-oss, arXiv 2508.10925, section 2.2; Xiao et al. 2023, arXiv 2309.17453, equation 2 is a sink of 0.)
    """
    sink = sinks.astype(lse.dtype)[None, None, :]
    # A row without keys has lse -inf, beside which the difference must not become inf - inf.
    finite_lse = jnp.where(jnp.isneginf(lse), sink - 1e4, lse)
    share = jax.nn.sigmoid(finite_lse - sink)
    return out * share[..., None].astype(out.dtype), jnp.logaddexp(finite_lse, sink)
