"""Stacks of blocks under `nn.scan`, the settings of blocks, and the block masks that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from attnlab.attention import prepare
from attnlab.attention.attend import make_dropout
from attnlab.attention.block_mask import BlockMask
from attnlab.attention.kv_cache import CachedKeys, LayerCache
from attnlab.attention.masks.base import Mask
from attnlab.layers.attention import (
    AttentionConfig,
    SequenceInputs,
    SharedBlockMasks,
    self_attention_mask,
)
from attnlab.layers.cross_attention import (
    CROSS_SPEC,
    cross_attention_mask,
    perceiver_attention_mask,
)
from attnlab.layers.experts import ExpertsConfig
from attnlab.layers.linear import Dtypes, Normal
from attnlab.layers.position_wise import GatedMLPConfig, LayerNormConfig, MLPConfig, RMSNormConfig
from attnlab.layers.remat import Remat, remat_policy
from attnlab.layers.specs import FirstValue, LayerSpec, NoPositions, RelativeBias, Rotary
from attnlab.sharding import has_sharded_length, length_axes, out_sharding

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
BlockCache = LayerCache | tuple[LayerCache | None, LayerCache | None]
# Of the repeats of the pattern, one stacked cache for each spec, and of the remaining layers.
LayerCaches = tuple[Sequence[BlockCache | None] | None, Sequence[BlockCache | None] | None]


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


class PatternBlock(nn.Module):
    """One repeat of a pattern: one module `block` for each spec, in order."""

    block: type[nn.Module]
    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool
    skip_attention_norm: bool = False

    @nn.compact
    def __call__(self, carry, layer_caches, inputs: SequenceInputs):
        """Return the carry after these blocks, and their caches.

        The carry is the activations, and the first layer's values or None.
        """
        x, first_value = carry
        new_caches = []
        for i, spec in enumerate(self.specs):
            options = (self.config, spec, self.deterministic, self.skip_attention_norm)
            block = self.block(*options, name=f"block{i}")  # type: ignore[call-arg]
            block_inputs = replace(inputs, first_value=first_value)
            x, new_cache, first_value = block(x, block_inputs, layer_caches and layer_caches[i])
            new_caches.append(new_cache)
        return (x, first_value), tuple(new_caches) if layer_caches is not None else None


class SharedLayers(nn.Module):
    """A pattern applied `times` times with the same parameters.

    ALBERT, arXiv 1909.11942, section 3.1.
    """

    times: int
    scan: bool
    block: type[nn.Module]
    config: BlockConfig
    specs: tuple[LayerSpec, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, carry, layer_caches, inputs: SequenceInputs):
        """Return the carry after the last repeat, and the caches; see `PatternBlock`."""
        loop = _loop(PatternBlock, self.times, self.scan, shared=True)
        options = (self.block, self.config, self.specs, self.deterministic)
        return loop(*options, name="shared")(carry, layer_caches, inputs)


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
        check_constancy_invariants=shared,  # shared parameters need a second trace of the body
    )


class LayerStack(nn.Module):
    """`config.depth` blocks whose specs repeat `pattern`.

    Whole repeats of the pattern are scanned over; the remaining layers follow. The parameters have
    the same shapes whether the scan is a loop or unrolled, so one checkpoint fits both.

    Attributes:
      block: module class of a block.
      config: settings of every block.
      pattern: specs of the layers of one repeat.
      scan: compile one repeat and loop over it, instead of unrolling all of them.
      remat: activations recomputed in the backward pass; see `TransformerConfig`.
      num_param_groups: number of parameter sets; each is used by the same number of consecutive
        repeats. The depth must then be a multiple of the pattern, and caches are not supported.
        None gives each repeat its own parameters.
      skip_first_attention_norm: omit the norm before attention in the first block. That block is
        then outside the scan and has no cache, and the repeats begin with the second layer.
      unrolled: stack no parameters; see `TransformerConfig`.
    """

    block: type[nn.Module]
    config: BlockConfig
    pattern: tuple[LayerSpec, ...]
    scan: bool
    remat: Remat
    num_param_groups: int | None = None
    skip_first_attention_norm: bool = False
    unrolled: bool = False

    @nn.compact
    def __call__(self, x, layer_caches, inputs: SequenceInputs, deterministic: bool):
        """Return the activations after all blocks, and their caches: (of the scan, of the rest)."""
        config, specs, depth = self.config, self.pattern, self.config.depth
        scanned, remainder = layer_caches if layer_caches is not None else (None, None)
        sow = self.is_mutable_collection("intermediates")
        inputs = share_block_masks(config, specs, x, layer_caches, inputs, deterministic, sow)
        carry = x, self._no_first_value(x)
        if self.skip_first_attention_norm:
            first_block = PatternBlock(
                self._block(looped=False), config, specs[:1], deterministic, True, name="first"
            )
            carry, _ = first_block(carry, None, inputs)
            specs, depth = (*specs[1:], specs[0]), depth - 1
        repeats = 0 if self.unrolled else depth // len(specs)
        if self.num_param_groups:
            options = (repeats // self.num_param_groups, self.scan, self._block(self.scan))
            stack = _loop(SharedLayers, self.num_param_groups, self.scan)(
                *options, config, specs, deterministic, name="periods"
            )
            carry, scanned = stack(carry, scanned, inputs)
        elif repeats:
            loop = _loop(PatternBlock, repeats, self.scan)
            stack = loop(self._block(self.scan), config, specs, deterministic, name="periods")
            carry, scanned = stack(carry, scanned, inputs)
        rest = tuple(specs[i % len(specs)] for i in range(repeats * len(specs), depth))
        if rest:
            last = PatternBlock(self._block(looped=False), config, rest, deterministic, name="tail")
            carry, remainder = last(carry, remainder, inputs)
        return carry[0], (scanned, remainder) if layer_caches is not None else None

    def _no_first_value(self, x: Float[Array, "B T E"]) -> FirstValue | None:
        """Return the first layer's values before the first layer; None if no mixer uses them."""
        if not any(spec.mixer is not None and spec.mixer.uses_first_value for spec in self.pattern):
            return None
        c = self.config.attention
        shape = (*x.shape[:2], c.kv_heads or c.heads, c.head_dim or self.config.width // c.heads)
        spec = out_sharding("batch", "sequence", "kv_heads", None, shape=shape)
        value = jnp.zeros(shape, self.config.dtypes.compute, out_sharding=spec)
        return FirstValue(value, jnp.zeros((), bool))

    def _block(self, looped: bool) -> type[nn.Module]:
        """Return the module class of a block, with `nn.remat` unless "none"."""
        if self.remat == "none":
            return self.block
        # In a loop, XLA cannot merge the recomputation with the forward pass, so prevent_cse is not
        # needed. Outside a loop it would merge them.
        return nn.remat(self.block, policy=remat_policy(self.remat), prevent_cse=not looped)


def share_block_masks(
    config: BlockConfig,
    specs: tuple[LayerSpec, ...],
    x: Float[Array, "B T E"],
    layer_caches: LayerCaches | None,
    inputs: SequenceInputs,
    deterministic: bool,
    sow: bool,
) -> SequenceInputs:
    """Return the inputs with the block masks of a stack, each made once for all layers of a spec.

    Layers with a cache whose keys are not in the order of its slots make their own.

    Args:
      config: settings of the stack.
      specs: specs of the layers.
      x: input of the stack.
      layer_caches: caches of the layers; None if they have none.
      inputs: inputs of the stack.
      deterministic: whether dropout is disabled.
      sow: whether the layers store their weights.
    """
    c, length = config.attention, x.shape[1]
    dropout = make_dropout(c.dropout, jax.random.key(0), None, deterministic, False)
    head_dim = c.head_dim or config.width // c.heads

    def shape(length: int, heads: int, axis: str, sharded: bool) -> jax.ShapeDtypeStruct:
        sizes = x.shape[0], length, heads, head_dim
        spec = out_sharding("batch", "sequence" if sharded else None, axis, "head_dim", shape=sizes)
        sharding = spec and NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return jax.ShapeDtypeStruct(sizes, x.dtype, sharding=sharding)

    def prepare_mask(spec: LayerSpec, mask: Mask, num_keys: int, sharded: bool) -> BlockMask | None:
        query = shape(length, c.heads, "heads", sharded)
        key = shape(num_keys, c.kv_heads or c.heads, "kv_heads", sharded)
        options: dict[str, Any] = {"dropout": dropout, "return_weights": sow}
        if spec.normalizer is not None and spec.normalizer.softmax_sink is None:
            options["normalizer"] = spec.normalizer
        return prepare(query, key, key, mask=mask, **options)

    def prepare_spec(spec: LayerSpec) -> BlockMask | None:
        if isinstance(config.cross, PerceiverAttentionConfig) and inputs.memory is not None:
            num_keys = inputs.memory.hidden.shape[1] + length
            return prepare_mask(spec, perceiver_attention_mask(spec, inputs), num_keys, sharded=False)
        num_keys = length if inputs.cache is None else inputs.cache.segments.shape[1]
        keys = CachedKeys(x, x)  # key i is in slot i; the mask depends on nothing else of the keys
        return prepare_mask(spec, self_attention_mask(spec, inputs, keys), num_keys, sharded=True)

    cross = None
    if isinstance(config.cross, CrossAttentionConfig | GatedCrossAttentionConfig):
        num_keys, sharded = _memory_length(inputs)
        sharded = sharded and all(length_axes("sequence", n) for n in (length, num_keys))
        cross = prepare_mask(CROSS_SPEC, cross_attention_mask(CROSS_SPEC, inputs), num_keys, sharded)
    distinct = tuple(spec for spec in dict.fromkeys(specs) if _keeps_slots(spec, specs, layer_caches))
    masks = SharedBlockMasks(distinct, tuple(map(prepare_spec, distinct)), cross)
    return replace(inputs, block_masks=masks)


def _memory_length(inputs: SequenceInputs) -> tuple[int, bool]:
    """Return the number of keys of cross-attention, and whether their length may be sharded."""
    if inputs.memory is not None:
        return inputs.memory.hidden.shape[1], has_sharded_length(inputs.memory.hidden)
    assert inputs.cache is not None, "cross-attention needs a memory or cache"
    return inputs.cache.context.shape[1], False


def _keeps_slots(spec: LayerSpec, specs: tuple[LayerSpec, ...], layer_caches: LayerCaches | None) -> bool:
    """Return whether the keys of every layer of a spec follow the slots of its cache."""
    for part in layer_caches or ():
        for other, layer_cache in zip(cycle(specs), part or ()):
            own = layer_cache[0] if isinstance(layer_cache, tuple) else layer_cache
            if other == spec and not (own is None or own.keeps_slots):
                return False
    return True
