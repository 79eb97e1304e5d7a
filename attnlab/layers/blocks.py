"""A residual block, and a run of blocks scanned over."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.kv_cache import KVCache
from attnlab.layers.attention import (
    Attention,
    AttentionConfig,
    Bidirectional,
    CrossAttention,
    LayerSpec,
    NoPositions,
    PerceiverAttention,
    RelativeBias,
    Rotary,
    SequenceInputs,
)
from attnlab.layers.dropout import Dropout
from attnlab.layers.experts import Experts, ExpertsConfig
from attnlab.layers.feed_forward import GatedMLPConfig, MLPConfig
from attnlab.layers.initialization import Normal
from attnlab.layers.norms import LayerNormConfig, RMSNormConfig
from attnlab.layers.parameters import Dtypes, parameter

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


Placement = Literal["pre", "post", "both", "branch"]


@dataclass(frozen=True)
class CrossAttentionConfig:
    """A branch of attention to the memory between the other two (Vaswani et al. 2017, section 3.1)."""


@dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """Before the other two branches, one of attention to the memory and a feed-forward one of its own, each
    times the tanh of a learned number from 0, so that at first nothing changes (Flamingo, arXiv 2204.14198,
    section 3.1.2).
    """


@dataclass(frozen=True)
class PerceiverAttentionConfig:
    """Attention sees the memory, normalised, beside the tokens: learned latents resample it (the Perceiver
    resampler of Flamingo, arXiv 2204.14198, section 3.1.1).
    """


# How blocks look at a memory.
Cross: TypeAlias = CrossAttentionConfig | GatedCrossAttentionConfig | PerceiverAttentionConfig
# Of a block's own tokens, or of those and of an encoder's output.
BlockCache = KVCache | tuple[KVCache | None, KVCache | None]


@dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a stack share; a model's config makes one of itself.

    `placement` says where norms stand around a branch f: x + f(norm(x)) is "pre" (arXiv 2002.04745),
    norm(x + f(x)) "post" (Vaswani et al. 2017, section 3.1), x + norm(f(norm(x))) "both" (Gemma 2), and
    x + norm(f(x)) "branch" (OLMo 2, arXiv 2501.00656, section 3.2). `layer_scale` is where a learned factor
    of each number that a branch adds starts, if there is one (CaiT, arXiv 2103.17239, section 2). `cross` is
    how blocks look at a memory, if their spec does; None is not at all.
    """

    width: int
    depth: int
    attention: AttentionConfig
    feed_forward: MLPConfig | GatedMLPConfig | ExpertsConfig
    norm: RMSNormConfig | LayerNormConfig
    placement: Placement
    layer_scale: float | None
    positions: Rotary | RelativeBias | NoPositions
    cross: Cross | None
    dropout: float
    init: Normal
    dtypes: Dtypes


class Block(nn.Module):
    """A residual block: a branch of attention and a feed-forward one, and those that look at a memory.

    With `skip_attention_norm`, no norm stands before attention.
    """

    config: BlockConfig
    spec: LayerSpec
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], inputs: SequenceInputs, layer_cache: BlockCache | None
    ) -> tuple[Float[Array, "B T E"], BlockCache | None]:
        """The activations after the block, and its cache."""
        self.sow("intermediates", "hidden", x)
        self_cache, cross_cache = layer_cache if isinstance(layer_cache, tuple) else (layer_cache, None)
        cross = self.config.cross if self.spec.cross_attends else None
        if isinstance(cross, GatedCrossAttentionConfig):
            x, cross_cache = self._cross_attend(x, inputs, cross_cache, gated=True)
            y = self._feed_forward(self._pre_norm(x, "cross_feed_forward"), inputs, "cross_feed_forward")
            x = self._residual(x, y, "cross_feed_forward", gated=True)
        positions = self.spec.positions or self.config.positions
        layer = PerceiverAttention if isinstance(cross, PerceiverAttentionConfig) else Attention
        attention = self._attention(layer, "attention", self.spec, positions)
        y, self_cache = attention(self._pre_norm(x, "attention"), inputs, self_cache, self.deterministic)
        x = self._residual(x, y, "attention")
        if isinstance(cross, CrossAttentionConfig):
            x, cross_cache = self._cross_attend(x, inputs, cross_cache)
        y = self._feed_forward(self._pre_norm(x, "feed_forward"), inputs, "feed_forward")
        x = self._residual(x, y, "feed_forward")
        return x, (self_cache, cross_cache) if isinstance(layer_cache, tuple) else self_cache

    def _cross_attend(self, x, inputs: SequenceInputs, cross_cache: KVCache | None, gated: bool = False):
        """After a branch of attention to the memory; and the cache with its keys and values."""
        layer = self._attention(CrossAttention, "cross_attention", Bidirectional(), NoPositions())
        y, cross_cache = layer(self._pre_norm(x, "cross_attention"), inputs, cross_cache, self.deterministic)
        return self._residual(x, y, "cross_attention", gated), cross_cache

    def _attention(self, layer: type[Attention], name: str, spec: LayerSpec, positions) -> Attention:
        c = self.config
        scale = c.init.attention_scale(c.attention.head_dim or c.width // c.attention.heads)
        return layer(c.attention, spec, positions, c.norm, scale, *self._std, c.dtypes, name=name)

    def _feed_forward(
        self, x: Float[Array, "B T E"], inputs: SequenceInputs, name: str
    ) -> Float[Array, "B T E"]:
        c = self.config
        if isinstance(c.feed_forward, ExpertsConfig):
            return Experts(c.feed_forward, *self._std, c.dtypes, name=name)(x, inputs.segments > 0)
        return c.feed_forward.build(*self._std, c.dtypes, name=name)(x)

    @property
    def _std(self) -> tuple[float, float]:
        """Deviation of the initial weights, and of those that a branch ends with."""
        std = self.config.init.hidden_std(self.config.width)
        return std, std / (2 * self.config.depth) ** 0.5

    def _pre_norm(self, x: Float[Array, "B T E"], branch: str) -> Float[Array, "B T E"]:
        """What a branch reads of the residual stream."""
        skip = self.skip_attention_norm and branch == "attention"
        return self._norm(x, branch) if self.config.placement in ("pre", "both") and not skip else x

    def _residual(
        self, x: Float[Array, "B T E"], y: Float[Array, "B T E"], branch: str, gated: bool = False
    ) -> Float[Array, "B T E"]:
        """The residual stream with a branch's result in it."""
        c = self.config
        if c.placement in ("both", "branch"):
            y = self._norm(y, f"{branch}_out")
        if c.layer_scale is not None:
            name = f"{branch}_layer_scale"
            y = y * parameter(self, name, (c.width,), ("norm",), c.dtypes, mean=c.layer_scale)[None, None]
        if gated:
            gate = parameter(self, f"{branch}_gate", (1,), ("norm",), c.dtypes)
            y = y * jnp.tanh(gate)[None, None]
        x = x + Dropout(c.dropout)(y, deterministic=self.deterministic)
        return self._norm(x, branch) if c.placement == "post" else x

    def _norm(self, x: Float[Array, "B T E"], name: str) -> Float[Array, "B T E"]:
        return self.config.norm.build(self.config.dtypes, name=f"{name}_norm")(x)


class PatternBlock(nn.Module):
    """One block for each spec of a pattern, in order; see `Block`."""

    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs):
        """The activations after these blocks, and their caches."""
        new_caches = []
        for i, spec in enumerate(self.specs):
            block = Block(self.config, spec, self.deterministic, self.skip_attention_norm, name=f"block{i}")
            x, new_cache = block(x, inputs, layer_caches and layer_caches[i])
            new_caches.append(new_cache)
        return x, tuple(new_caches) if layer_caches is not None else None


class SharedLayers(nn.Module):
    """A period applied `times` over with one set of parameters (ALBERT, arXiv 1909.11942, section 3.1)."""

    body: type[nn.Module]
    times: int
    scan: bool
    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs):
        """The activations after the last of them, and their caches."""
        loop = _loop(self.body, self.times, self.scan, shared=True)
        return loop(self.config, self.specs, self.deterministic, name="shared")(x, layer_caches, inputs)


def _loop(body: type[nn.Module], length: int, scan: bool, shared: bool = False):
    """`body`, so many times in turn; each with parameters of its own, or all with the same."""
    of_each = ("intermediates", "losses") if shared else ("params", "intermediates", "losses")
    return nn.scan(
        body,
        variable_axes=dict.fromkeys(of_each, 0),
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=1 if scan else length,
    )


class LayerStack(nn.Module):
    """`depth` blocks whose specs repeat `pattern`: whole periods are scanned over, the rest come after them.

    Parameters lie the same way whether the scan is a loop or unrolled, so one checkpoint fits both.

    Attributes:
      num_param_groups: sets of parameters, each for as many periods in turn; the layers must be whole periods
        then, and have no caches. None is a set for each period.
      skip_first_attention_norm: whether the first block has no norm before attention. It then stands by
        itself, without a cache, and the periods begin with the second.
    """

    config: BlockConfig
    pattern: tuple[LayerSpec, ...]
    scan: bool
    remat: Literal["none", "full", "dots"]
    num_param_groups: int | None = None
    skip_first_attention_norm: bool = False

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs, deterministic: bool):
        """The activations after all blocks, and their caches as `caches` lays them out."""
        config, specs, depth = self.config, self.pattern, self.config.depth
        scanned, remainder = layer_caches if layer_caches is not None else (None, None)
        if self.skip_first_attention_norm:
            first = self._pattern_block(looped=False)(
                config, specs[:1], deterministic, skip_attention_norm=True, name="first"
            )
            x, _ = first(x, None, inputs)
            specs, depth = (*specs[1:], specs[0]), depth - 1
        periods, rest = divmod(depth, len(specs))
        if self.num_param_groups:
            options = (self._pattern_block(self.scan), periods // self.num_param_groups, self.scan)
            stack = _loop(SharedLayers, self.num_param_groups, self.scan)(
                *options, config, specs, deterministic, name="periods"
            )
            x, scanned = stack(x, scanned, inputs)
        elif periods:
            loop = _loop(self._pattern_block(self.scan), periods, self.scan)
            x, scanned = loop(config, specs, deterministic, name="periods")(x, scanned, inputs)
        if rest:
            last = self._pattern_block(looped=False)(config, specs[:rest], deterministic, name="tail")
            x, remainder = last(x, remainder, inputs)
        return x, (scanned, remainder) if layer_caches is not None else None

    def _pattern_block(self, looped: bool) -> type[nn.Module]:
        """A period, recomputed in the backward pass if asked."""
        if self.remat == "none":
            return PatternBlock
        # Inside a loop XLA cannot merge the recomputation with what it recomputes; elsewhere it would.
        return nn.remat(PatternBlock, policy=REMAT_POLICIES[self.remat], prevent_cse=not looped)
