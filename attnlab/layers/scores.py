"""Scores of a layer: configs that declare parameters and return the score for `attend`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.attention import alibi, bias, cope, forgetting, shaw, softcap, t5_bias, temperature
from attnlab.attention.arrays import wide
from attnlab.attention.kv_cache import KVCache
from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.pairwise import pair_indices
from attnlab.attention.scores import BidirectionalForgettingScore, ForgettingScore, Score
from attnlab.layers.linear import Dtypes, contract, parameter
from attnlab.sharding import constrain, gather_length

# (name, shape, logical axes, std=, mean=) -> the parameter, in at least float32; see `parameter`.
Declare = Callable[..., Array]
State = Mapping[str, Array]
# Dimensions of a value of one token: (size, logical axis).
TokenDims = tuple[tuple[int, str | None], ...]


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a layer's score.

    Attributes:
      hidden: input of the attention layer.
      query: queries, with positions.
      key: keys, with positions; from a cache, of all slots.
      positions: position of each query in its document.
      mask: the whole mask that `attend` gets.
      scale: factor of the scores.
      causal: whether the layer's spec is causal.
      offset: key index of the first query: the number of tokens in the cache before it.
      state: what `LayerScore.token_state` returned for each token, also those in the cache.
    """

    hidden: Float[Array, "B T E"]
    query: Float[Array, "B T H D"]
    key: Float[Array, "B S K D"]
    positions: Int[Array, "B T"]
    mask: Mask
    scale: float
    causal: bool
    offset: Index = 0
    state: State = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Number of query heads H."""
        return self.query.shape[2]


class LayerSizes(NamedTuple):
    """Sizes of an attention layer: model width E, heads H, key/value heads K, head width D."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class Products(NamedTuple):
    """Multiply-adds of the matrix products of an attention layer.

    Attributes:
      token: with parameters, per token.
      pair: of scores and weighted sums, of all heads, per pair of a query and a key.
    """

    token: int = 0
    pair: int = 0


class LayerScore(ABC):
    """Score of a layer. For a new one, derive a frozen dataclass in an experiment's file.

    `declare(name, shape, axes, std=, mean=)` declares a parameter of the layer and returns it; it
    may be called once for each name.
    """

    @abstractmethod
    def score(self, inputs: ScoreInputs, declare: Declare) -> Score:
        """Return the score for `attend`."""

    def token_state(self, inputs: ScoreInputs, declare: Declare) -> State:
        """Return what later queries need of each token besides its key, (B, T, ...), by name.

        A KV cache stores it; `ScoreInputs.state` then holds that of all slots, (B, S, ...).
        """
        del inputs, declare
        return {}

    def state_dims(self, heads: int, slots: int) -> dict[str, TokenDims]:
        """Return the dimensions of each token's state, for a cache with this number of slots."""
        del heads, slots
        return {}

    def products(self, sizes: LayerSizes) -> Products:
        """Return the multiply-adds that the score adds to the layer's, for the count of FLOPs."""
        del sizes
        return Products()


class ScoreModule(nn.Module):
    """Declares the parameters of a `LayerScore`."""

    config: LayerScore
    dtypes: Dtypes

    @nn.compact
    def __call__(self, inputs: ScoreInputs, cache: KVCache | None = None) -> tuple[Score, State]:
        """Return the score, and the state of all tokens, the cached and the new ones."""
        state = self.config.token_state(inputs, self._declare)
        if cache is not None:
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=inputs.offset, axis=1)
            stored = cache.state
            state = {name: put(stored[name], x.astype(stored[name].dtype)) for name, x in state.items()}
        return self.config.score(replace(inputs, state=state), self._declare), state

    def _declare(self, name, shape, axes, std: float = 0.0, mean=0.0) -> Array:
        return parameter(self, name, shape, axes, self.dtypes, std=std, mean=mean, wide=True)


def score_names(scores: Sequence[LayerScore]) -> list[tuple[str, LayerScore]]:
    """Return each score with the name of its module: `score_ALiBi`, then `score_ALiBi_1`."""
    names: list[str] = []
    for score in scores:
        name = f"score_{type(score).__name__}"
        names.append(f"{name}_{count}" if (count := names.count(name)) else name)
    return list(zip(names, scores, strict=True))


@dataclass(frozen=True)
class Softcap(LayerScore):
    """cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float = 50.0

    def __post_init__(self):
        if self.cap <= 0:
            raise ValueError(f"cap={self.cap} must be over 0")

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        return softcap(self.cap)


@dataclass(frozen=True)
class Temperature(LayerScore):
    """score * factor, with a learned factor per head, in causal layers times log(position + 1).

    Sharpness then does not depend on the number of keys (Scalable-Softmax, arXiv 2501.19399). The
    factor starts at 1; in causal layers at 1 / log(length), which is 1 for the last of `length`
    tokens (arXiv 2202.12172).
    """

    length: int = 1024

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2")

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        mean = 1 / math.log(self.length) if inputs.causal else 1.0
        factor = declare("factor", (inputs.heads,), ("heads",), mean=mean)[None, :, None, None]
        if inputs.causal:
            factor = factor * jnp.log(inputs.positions[:, None, :, None].astype(jnp.float32) + 1)
        return temperature(factor)


@dataclass(frozen=True)
class ALiBi(LayerScore):
    """score - slope * |distance|, with a fixed slope per head (arXiv 2108.12409, section 3)."""

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        return alibi(inputs.heads, inputs.offset)


@dataclass(frozen=True)
class T5Bias(LayerScore):
    """score + a learned bias per bucket of distances and head (arXiv 1910.10683, section 2.1).

    Each layer has a table of its own; `positions=RelativeBias` shares one between all layers.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets} must be at least 4, and "
                f"max_distance={self.max_distance} over half of that"
            )

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        table = declare("table", (self.buckets, inputs.heads), ("window", "heads"), std=0.02)
        return t5_bias(
            table,
            bidirectional=not inputs.causal,
            max_distance=self.max_distance,
            offset=inputs.offset,
        )


@dataclass(frozen=True)
class Shaw(LayerScore):
    """score + query . embedding of the distance, clipped to `max_distance` (arXiv 1803.02155)."""

    max_distance: int = 16

    def __post_init__(self):
        if self.max_distance < 1:
            raise ValueError(f"max_distance={self.max_distance} must be at least 1")

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        shape = (2 * self.max_distance + 1, inputs.query.shape[-1])
        table = declare("table", shape, ("window", "head_dim"), std=0.02)
        return shaw(inputs.query, table, scale=inputs.scale, offset=inputs.offset)

    def products(self, sizes):
        """See `LayerScore.products`."""
        return Products(sizes.heads * sizes.head_dim * (2 * self.max_distance + 1))


@dataclass(frozen=True)
class CoPE(LayerScore):
    """score + query . embedding of the contextual position of the key (arXiv 2405.18719).

    Memory grows with T * S.
    """

    positions: int = 64

    def __post_init__(self):
        if self.positions < 2:
            raise ValueError(f"positions={self.positions} must be at least 2")

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        table = declare("table", (self.positions, inputs.query.shape[-1]), ("window", "head_dim"), std=0.02)
        return cope(inputs.query, inputs.key, table, inputs.mask, scale=inputs.scale)

    def products(self, sizes):
        """See `LayerScore.products`; the gates need the scores once more."""
        width = sizes.heads * sizes.head_dim
        return Products(width * self.positions, width)


@dataclass(frozen=True)
class FoX(LayerScore):
    """score + log of the forget gates between key and query (Forgetting Transformer, 2503.02130).

    A gate is the sigmoid of a projection of the layer's input, whose bias starts at `bias`. In
    layers that are not causal, the gates between query and a later key count as well.
    """

    bias: float = 2.0

    def token_state(self, inputs, declare):
        """Return the log gates, (B, T, H)."""
        width = inputs.hidden.shape[-1]
        kernel = declare("kernel", (width, inputs.heads), ("embed", "heads"), std=width**-0.5)
        shift = declare("bias", (inputs.heads,), ("heads",), mean=self.bias)
        logits = contract(inputs.hidden.astype(kernel.dtype), kernel, 1, ("heads",))
        # One number per token and head: every device sums over the whole length.
        return {"log_gates": gather_length(jax.nn.log_sigmoid(logits + shift[None, None]))}

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        score = forgetting(inputs.state["log_gates"])
        assert isinstance(score, ForgettingScore)
        queries = _rows(score.queries, inputs, axis=2)
        kind = ForgettingScore if inputs.causal else BidirectionalForgettingScore
        return kind(queries, score.keys)

    def state_dims(self, heads, slots):
        """See `LayerScore.state_dims`."""
        return {"log_gates": ((heads, "heads"),)}

    def products(self, sizes):
        """See `LayerScore.products`."""
        return Products(sizes.width * sizes.heads)


@dataclass(frozen=True)
class Selective(LayerScore):
    """score - what earlier queries subtract from the key (selective attention, arXiv 2410.02703).

    A token subtracts max(0, score) of the first head, but nothing from itself or from the first
    token of its document. Memory, also of a KV cache, is quadratic in the length. A mesh axis
    `sequence` shards the sums over earlier queries by their keys.
    """

    def token_state(self, inputs, declare):
        """Return the subtrahend of each token and key, (B, T, S), and which tokens are first."""
        query = constrain(inputs.query, "batch", None, None, None)[:, :, 0]
        key = constrain(inputs.key, "batch", "sequence", None, None)[:, :, 0]
        products = jnp.einsum("btd,bsd->bts", query, key, preferred_element_type=wide(query)) * inputs.scale
        at = pair_indices(len(query), 1, query.shape[1], key.shape[1])
        subtracts = (inputs.mask.evaluate(at) & (at.kv != at.q + inputs.offset))[:, 0]
        subtracts = constrain(subtracts, "batch" if len(subtracts) > 1 else None, None, "sequence")
        first = (inputs.positions == 0).astype(jnp.float32)
        return {"subtracted": jnp.where(subtracts, jax.nn.relu(products), 0), "first": first}

    def score(self, inputs, declare):
        """See `LayerScore.score`."""
        earlier = jnp.pad(inputs.state["subtracted"][:, :-1], [(0, 0), (1, 0), (0, 0)])
        total = _rows(jnp.cumsum(earlier, axis=1), inputs, axis=1)
        return bias(-(total * (1 - inputs.state["first"][:, None]))[:, None])

    def state_dims(self, heads, slots):
        """See `LayerScore.state_dims`."""
        return {"subtracted": ((slots, None),), "first": ()}

    def products(self, sizes):
        """See `LayerScore.products`: the scores of the first head once more."""
        return Products(0, sizes.head_dim)


def _rows(x: Array, inputs: ScoreInputs, axis: int) -> Array:
    """Return the rows of the queries, from `offset` on, of an array over all tokens."""
    return jax.lax.dynamic_slice_in_dim(x, inputs.offset, inputs.query.shape[1], axis)
