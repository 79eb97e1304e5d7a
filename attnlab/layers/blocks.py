"""Residual blocks, and stacks of blocks under `nn.scan`."""

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
    """A cross-attention branch between self-attention and the feed-forward layer.

    Vaswani et al. 2017, section 3.1.
    """


@dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """A gated cross-attention branch and a gated MLP branch before self-attention.

    Each is multiplied by tanh of a learned gate. Gates start at 0, so the branches initially change
    nothing (Flamingo, arXiv 2204.14198, section 3.1.2).
    """


@dataclass(frozen=True)
class PerceiverAttentionConfig:
    """Self-attention whose keys and values also include the normalised encoder output.

    The Perceiver resampler of Flamingo uses it with learned latents as tokens (arXiv 2204.14198,
    section 3.1.1).
    """


Cross: TypeAlias = CrossAttentionConfig | GatedCrossAttentionConfig | PerceiverAttentionConfig
# Self-attention cache, or (self-attention cache, cross-attention cache).
BlockCache = KVCache | tuple[KVCache | None, KVCache | None]


@dataclass(frozen=True)
class BlockConfig:
    """Settings that all blocks of a stack share; `TransformerConfig.block` builds one.

    Attributes:
      width: model width E.
      depth: number of layers L.
      attention: config of self-attention and cross-attention.
      feed_forward: config of the feed-forward layer.
      norm: config of every norm.
      placement: norms around a branch f: "pre" is x + f(norm(x)) (arXiv 2002.04745), "post" is
        norm(x + f(x)) (Vaswani et al. 2017, section 3.1), "both" is x + norm(f(norm(x))) (Gemma 2),
        "branch" is x + norm(f(x)) (OLMo 2, arXiv 2501.00656, section 3.2).
      layer_scale: initial value of a learned scale per channel of each branch (CaiT, arXiv
        2103.17239, section 2); None disables it.
      positions: position embedding of the layers whose spec has none of its own.
      cross: kind of cross-attention in layers with `cross_attends`; None disables it.
      dropout: dropout rate of each branch in training.
      init: initialisation.
      dtypes: dtypes of parameters and computation.
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
    """A residual block: self-attention, MLP or experts, and optionally cross-attention.

    `skip_attention_norm` omits the norm before self-attention.
    """

    config: BlockConfig
    spec: LayerSpec
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], inputs: SequenceInputs, layer_cache: BlockCache | None
    ) -> tuple[Float[Array, "B T E"], BlockCache | None]:
        """Return the activations after the block, and its cache."""
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
        """Return the activations after a cross-attention branch, and the branch's cache."""
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
        """Standard deviations of initial weights: in general, and of a branch's last projection."""
        std = self.config.init.hidden_std(self.config.width)
        return std, std / (2 * self.config.depth) ** 0.5

    def _pre_norm(self, x: Float[Array, "B T E"], branch: str) -> Float[Array, "B T E"]:
        """Return the input of a branch: the residual stream, normalised if `placement` says so."""
        skip = self.skip_attention_norm and branch == "attention"
        return self._norm(x, branch) if self.config.placement in ("pre", "both") and not skip else x

    def _residual(
        self, x: Float[Array, "B T E"], y: Float[Array, "B T E"], branch: str, gated: bool = False
    ) -> Float[Array, "B T E"]:
        """Return the residual stream `x` plus the output `y` of a branch."""
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
    """One repeat of a pattern: one `Block` for each spec, in order."""

    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs):
        """Return the activations after these blocks, and their caches."""
        new_caches = []
        for i, spec in enumerate(self.specs):
            block = Block(self.config, spec, self.deterministic, self.skip_attention_norm, name=f"block{i}")
            x, new_cache = block(x, inputs, layer_caches and layer_caches[i])
            new_caches.append(new_cache)
        return x, tuple(new_caches) if layer_caches is not None else None


class SharedLayers(nn.Module):
    """A pattern applied `times` times with the same parameters.

    ALBERT, arXiv 1909.11942, section 3.1.
    """

    body: type[nn.Module]
    times: int
    scan: bool
    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs):
        """Return the activations after the last repeat, and the caches."""
        loop = _loop(self.body, self.times, self.scan, shared=True)
        return loop(self.config, self.specs, self.deterministic, name="shared")(x, layer_caches, inputs)


def _loop(body: type[nn.Module], length: int, scan: bool, shared: bool = False):
    """Scan `body` over `length` steps, each with its own parameters or all with the same ones."""
    stacked = ("intermediates", "losses") if shared else ("params", "intermediates", "losses")
    return nn.scan(
        body,
        variable_axes=dict.fromkeys(stacked, 0),
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=1 if scan else length,
    )


class LayerStack(nn.Module):
    """`config.depth` blocks whose specs repeat `pattern`.

    Whole repeats of the pattern are scanned over; the remaining layers follow. The parameters have
    the same shapes whether the scan is a loop or unrolled, so one checkpoint fits both.

    Attributes:
      config: settings of every block.
      pattern: specs of the layers of one repeat.
      scan: compile one repeat and loop over it, instead of unrolling all of them.
      remat: activations recomputed in the backward pass; see `TransformerConfig`.
      num_param_groups: number of parameter sets; each is used by the same number of consecutive
        repeats. The depth must then be a multiple of the pattern, and caches are not supported.
        None gives each repeat its own parameters.
      skip_first_attention_norm: omit the norm before attention in the first block. That block is
        then outside the scan and has no cache, and the repeats begin with the second layer.
    """

    config: BlockConfig
    pattern: tuple[LayerSpec, ...]
    scan: bool
    remat: Literal["none", "full", "dots"]
    num_param_groups: int | None = None
    skip_first_attention_norm: bool = False

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs, deterministic: bool):
        """Return the activations after all blocks, and their caches: (of the scan, of the rest)."""
        config, specs, depth = self.config, self.pattern, self.config.depth
        scanned, remainder = layer_caches if layer_caches is not None else (None, None)
        if self.skip_first_attention_norm:
            first_block = self._pattern_block(looped=False)(
                config, specs[:1], deterministic, skip_attention_norm=True, name="first"
            )
            x, _ = first_block(x, None, inputs)
            specs, depth = (*specs[1:], specs[0]), depth - 1
        repeats, rest = divmod(depth, len(specs))
        if self.num_param_groups:
            options = (self._pattern_block(self.scan), repeats // self.num_param_groups, self.scan)
            stack = _loop(SharedLayers, self.num_param_groups, self.scan)(
                *options, config, specs, deterministic, name="periods"
            )
            x, scanned = stack(x, scanned, inputs)
        elif repeats:
            loop = _loop(self._pattern_block(self.scan), repeats, self.scan)
            x, scanned = loop(config, specs, deterministic, name="periods")(x, scanned, inputs)
        if rest:
            last = self._pattern_block(looped=False)(config, specs[:rest], deterministic, name="tail")
            x, remainder = last(x, remainder, inputs)
        return x, (scanned, remainder) if layer_caches is not None else None

    def _pattern_block(self, looped: bool) -> type[nn.Module]:
        """Return the module class of one repeat of the pattern, with `nn.remat` unless "none"."""
        if self.remat == "none":
            return PatternBlock
        # In a loop, XLA cannot merge the recomputation with the forward pass, so prevent_cse is not
        # needed. Outside a loop it would merge them.
        return nn.remat(PatternBlock, policy=REMAT_POLICIES[self.remat], prevent_cse=not looped)
