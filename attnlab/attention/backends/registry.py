"""What is asked of attention, and the backends that may answer, in the order in which they are preferred."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.backends.blockwise import blockwise, blockwise_twice
from attnlab.attention.backends.decode import single
from attnlab.attention.backends.reference import reference, softmax
from attnlab.attention.masks.base import BlockOffset, Mask
from attnlab.attention.scores import Score


@dataclass(frozen=True)
class Request:
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
      wants_weights: whether the weights are to be returned.
      wants_lse: whether the log-sum-exp is; where it is not, what a backend returns for it means nothing.
      platform: "cpu", "tpu", "gpu".
      sequence: the mesh axes that the length is sharded over.
      devices: how many parts that makes.
      is_part: whether other devices hold other rows, heads or parts of the length.
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
    wants_weights: bool = False
    wants_lse: bool = False
    platform: str = "cpu"
    sequence: tuple[str, ...] = ()
    devices: int = 1
    is_part: bool = False


class Result(NamedTuple):
    """The output (B, T, H, Dv), the log-sum-exp (B, T, H), and the weights (B, H, T, S) if asked for."""

    out: Array
    lse: Array
    weights: Array | None = None


@runtime_checkable
class Backend(Protocol):
    """A way to compute attention."""

    name: str

    def refuse(self, request: Request) -> str | None:
        """Why it cannot do what is asked; None where it can."""
        ...

    def run(self, request: Request, first: BlockOffset) -> Result:
        """The result for one device's part, whose batch row, head, query and key count from `first`."""
        ...


def sharded_length(request: Request) -> str | None:
    """Why a backend that needs the whole length on a device cannot do what is asked."""
    return f"the length is sharded over {', '.join(request.sequence)}" if request.sequence else None


def beyond_softmax(request: Request) -> str | None:
    """Why a backend that normalises by softmax, and never holds the weights, cannot do what is asked."""
    if request.dropout_rate:
        return "it never holds the weights, which dropout changes"
    if request.wants_weights:
        return "it never holds the weights, which return_weights asks for"
    return None if request.normalizer is softmax else "it normalises by softmax alone"


class Blockwise:
    """Any mask and score in memory linear in the length; see `blockwise`."""

    name = "blockwise"
    function = staticmethod(blockwise)

    def refuse(self, request):
        """See `Backend.refuse`."""
        return beyond_softmax(request) or sharded_length(request)

    def run(self, request, first):
        """See `Backend.run`."""
        r = request
        out, lse = self.function(
            r.query, r.key, r.value, mask=r.mask, score=r.score, scale=r.scale, first=first
        )
        return Result(*(out, lse) if r.sinks is None else with_sinks(out, lse, r.sinks))


class BlockwiseTwice(Blockwise):
    """The same with forward-mode and second derivatives; see `blockwise_twice`."""

    name = "blockwise_twice"
    function = staticmethod(blockwise_twice)


class Single:
    """Any mask and score of one query a row; see `single`."""

    name = "single"

    def refuse(self, request):
        """See `Backend.refuse`."""
        count = request.query.shape[1]
        one = None if count == 1 else f"it takes one query a row, not {count}"
        return one or beyond_softmax(request) or sharded_length(request)

    def run(self, request, first):
        """See `Backend.run`."""
        r = request
        what = {"mask": r.mask, "score": r.score, "scale": r.scale, "sinks": r.sinks}
        return Result(*single(r.query, r.key, r.value, **what, first=first))


class Reference:
    """Everything, in memory quadratic in the length; see `reference`."""

    name = "reference"

    def refuse(self, request):
        """See `Backend.refuse`."""
        return sharded_length(request)

    def run(self, request, first):
        """See `Backend.run`."""
        r = request
        result = Result(
            *reference(
                *(r.query, r.key, r.value),
                mask=r.mask,
                score=r.score,
                scale=r.scale,
                sinks=r.sinks,
                normalizer=r.normalizer,
                dropout_rate=r.dropout_rate,
                dropout_key=r.dropout_key,
                first=first,
            )
        )
        return result if r.wants_weights else result._replace(weights=None)


BACKENDS: list[Backend] = [Single(), Blockwise(), BlockwiseTwice(), Reference()]


def register(backend: Backend, before: str | None = None) -> None:
    """Adds a backend, preferred to the one named `before`; None is to all.

    Raises:
      ValueError: there is one of this name.
    """
    names = [known.name for known in BACKENDS]
    if backend.name in (*names, "auto"):
        raise ValueError(f"there is a backend named {backend.name!r}")
    BACKENDS.insert(0 if before is None else names.index(before), backend)


def with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The result with one more score in every row, which takes its share of the weight and gives nothing.

    (gpt-oss, arXiv 2508.10925, section 2.2; Xiao et al. 2023, arXiv 2309.17453, equation 2 is a sink of 0.)
    """
    sink = sinks.astype(lse.dtype)[None, None, :]
    # A row without keys has lse -inf, beside which the difference must not become inf - inf.
    known = jnp.where(jnp.isneginf(lse), sink - 1e4, lse)
    share = jax.nn.sigmoid(known - sink)
    return out * share[..., None].astype(out.dtype), jnp.logaddexp(known, sink)
