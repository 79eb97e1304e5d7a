"""Layer specs: the attention pattern of a layer, and its position embedding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention import attend, causal, t5_bias, window
from attnlab.attention.arrays import eval_at_trace_time
from attnlab.attention.kv_cache import KVCache
from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.masks.causality import is_causal
from attnlab.attention.positions import Scaling, rotary
from attnlab.attention.scores import Score
from attnlab.errors import check_fields
from attnlab.layers.normalizers import LayerNormalizer
from attnlab.layers.scores import LayerScore, LayerSizes, Products, TokenDims
from attnlab.sharding import out_sharding


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding over the first `fraction` of each head's width.

    `scaling` adapts the frequencies to lengths beyond the training length. `interleaved` rotates
    pairs of adjacent components of a head; otherwise the two components of a pair are half a head
    apart.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be over 0 and at most 1")
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be over 1")

    def __call__(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        """Return queries or keys rotated by their positions."""
        return rotary(
            x,
            positions,
            theta=self.theta,
            fraction=self.fraction,
            scaling=self.scaling,
            interleaved=self.interleaved,
        )


@dataclass(frozen=True)
class RelativeBias:
    """Relative position bias of T5 (arXiv 1910.10683, section 2.1).

    Adds a learned bias to every attention score. The distance between query and key selects one of
    `buckets` buckets, whose size grows up to `max_distance`. All layers share one table.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets} must be at least 4, and "
                f"max_distance={self.max_distance} over half of that"
            )

    def __call__(self, table: Float[Array, "buckets H"], spec: "LayerSpec", offset: Index) -> Score:
        """Return the bias of a layer of this spec; its first query is at key index `offset`."""
        return t5_bias(table, bidirectional=not spec.causal, max_distance=self.max_distance, offset=offset)


@dataclass(frozen=True)
class Learned:
    """Learned absolute position embeddings, added to the token embeddings.

    Attributes:
      length: rows of the table.
      offset: first rows that no position uses (RoBERTa, BART).
    """

    length: int = 1024
    offset: int = 0

    def __post_init__(self):
        if not 0 <= self.offset < self.length:
            raise ValueError(f"offset={self.offset} must be at least 0 and under length={self.length}")


@dataclass(frozen=True)
class Sinusoidal:
    """Sinusoidal position embeddings, added to the token embeddings.

    Vaswani et al. 2017, section 3.5.

    Attributes:
      halves: order all sines before all cosines, instead of interleaving them.
    """

    halves: bool = False


@dataclass(frozen=True)
class NoPositions:
    """No position embedding: only the mask carries the order of the tokens (NoPE)."""


# Adds positions to queries or keys; returns the scores of queries and keys.
Rotate = Callable[[Array], Array]
ScoreOf = Callable[[Array, Array], list[Score | None] | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FirstValue:
    """Values of the first layer that has a `ValueResidual`, and whether there has been one yet."""

    value: Float[Array, "B T K D"]
    found: Bool[Array, ""]


@dataclass(frozen=True)
class Mixer:
    """Plain attention. Variants, also of an experiment's file, replace one of its steps.

    `layer` is the module of the layer, which declares their parameters: it has `project(x, name)`,
    `config`, `dtypes`, `std` and the methods of a Flax module.

    Attributes:
      uses_first_value: whether `mix_values` needs the first layer's values.
    """

    uses_first_value: ClassVar[bool] = False

    def cache_dims(self, kv_heads: int, head_dim: int):
        """Return the dimensions of a token's key and value in a KV cache: (size, logical axis)."""
        return (((kv_heads, "kv_heads"), (head_dim, None)),) * 2

    def project(
        self, layer: Any, x: Float[Array, "B T E"], rotate: Rotate
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K Dv"]]:
        """Return queries, keys and values; a KV cache stores these keys and values."""
        query, key, value = (layer.project(x, name) for name in ("query", "key", "value"))
        return rotate(query), rotate(key), value

    def mix_values(
        self, layer: Any, value: Float[Array, "B T K Dv"], first: FirstValue | None
    ) -> tuple[Float[Array, "B T K Dv"], FirstValue | None]:
        """Return the values, and the first layer's values for the next layer."""
        del layer
        return value, first

    def attend(
        self,
        layer: Any,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K Dv"],
        score_of: ScoreOf,
        **options,
    ) -> Any:
        """Return what `attend` returns with these options."""
        del layer
        return attend(query, key, value, score=score_of(query, key), **options)

    def output(
        self, layer: Any, x: Float[Array, "B T E"], out: Float[Array, "B T H Dv"]
    ) -> Float[Array, "B T H Dv"]:
        """Return the input of the output projection."""
        del layer, x
        return out

    def products(self, sizes: LayerSizes) -> Products:
        """Return the multiply-adds of the layer in training, for the count of FLOPs."""
        token = sizes.width * sizes.head_dim * 2 * (sizes.heads + sizes.kv_heads)
        return Products(token, 2 * sizes.heads * sizes.head_dim)


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Attention pattern of a layer. To try a new mask, derive a class in an experiment's file.

    Attributes:
      positions: position embedding of queries and keys; None uses the model's.
      scale: factor of the scores of self-attention; None uses the model's.
      score: modifies the scores: one score, or several in order; None leaves them as they are.
      normalizer: maps the scores to weights; None is the softmax.
      mixer: how the layer computes attention from its input; None is `Mixer`, plain attention.
      cross_attends: whether the layer also cross-attends, in a model with cross-attention.
    """

    positions: Rotary | NoPositions | None = field(default=None, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)
    score: LayerScore | tuple[LayerScore, ...] | None = field(default=None, kw_only=True)
    normalizer: LayerNormalizer | None = field(default=None, kw_only=True)
    mixer: Mixer | None = field(default=None, kw_only=True)
    cross_attends: bool = field(default=True, kw_only=True)

    def __post_init__(self):
        check_fields(self, "scale", above=0)

    @abstractmethod
    def mask(self, offset: Index = 0) -> Mask:
        """Return the mask; its first query is at key index `offset`."""

    @cached_property
    def causal(self) -> bool:
        """Whether no token attends to a later one, as generation requires; see `is_causal`."""
        return bool(eval_at_trace_time(lambda: is_causal(self.mask())))

    @property
    def scores(self) -> tuple[LayerScore, ...]:
        """The scores, in order."""
        scores = self.score or ()
        return scores if isinstance(scores, tuple) else (scores,)

    def products(self, sizes: LayerSizes) -> Products:
        """Return the multiply-adds of the layer, with those of its scores."""
        token, pair = (self.mixer or Mixer()).products(sizes)
        for score in self.scores:
            added = score.products(sizes)
            token, pair = token + added.token, pair + added.pair
        return Products(token, pair)

    def empty_cache(
        self,
        batch: int,
        slots: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype,
        layers: int | None = None,
    ) -> KVCache:
        """Return an empty KV cache of a layer of this spec, or of `layers` scanned ones."""
        stack = () if layers is None else (layers,)

        def zeros(dims: TokenDims, dtype) -> Array:
            shape = (*stack, batch, slots, *(size for size, _ in dims))
            axes = (*(None for _ in stack), "batch", None, *(axis for _, axis in dims))
            return jnp.zeros(shape, dtype, out_sharding=out_sharding(*axes, shape=shape))

        key, value = (self.mixer or Mixer()).cache_dims(kv_heads, head_dim)
        state = {k: v for score in self.scores for k, v in score.state_dims(heads, slots).items()}
        return KVCache(
            zeros(key, dtype),
            zeros(value, dtype),
            {name: zeros(dims, jnp.float32) for name, dims in state.items()},
        )


@dataclass(frozen=True)
class Causal(LayerSpec):
    """Causal attention: every token attends to itself and all earlier tokens."""

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return causal(offset)


@dataclass(frozen=True)
class Sliding(LayerSpec):
    """Sliding-window attention over the last `window` tokens, including the token itself.

    Mistral, arXiv 2310.06825, section 2.
    """

    window: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "window", least=1)

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return window(self.window - 1, 0, offset)


@dataclass(frozen=True)
class Bidirectional(LayerSpec):
    """Bidirectional attention to `left` tokens before and `right` tokens after each token.

    None does not limit that side.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "left", "right", least=0)

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        return window(self.left, self.right, offset)
