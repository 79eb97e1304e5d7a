"""A pre-norm residual block, and a run of blocks scanned over."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from attnlab.attention.cache import Cache, LayerCache
from attnlab.layers.attention import Attention, AttentionLayer, Kind, NoPositions, Rotary
from attnlab.layers.dropout import Dropout
from attnlab.layers.feed_forward import MLP, FeedForward, GatedMLP
from attnlab.layers.initialization import Normal
from attnlab.layers.norms import LayerNorm, Norm, RMSNorm
from attnlab.layers.parameters import Dtypes

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a stack share; a model's config makes one of itself."""

    width: int
    depth: int
    attention: Attention
    feed_forward: MLP | GatedMLP
    norm: RMSNorm | LayerNorm
    positions: Rotary | NoPositions
    dropout: float
    init: Normal
    dtypes: Dtypes


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (pre-norm: Xiong et al. 2020, arXiv 2002.04745)."""

    config: BlockConfig
    kind: Kind
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache | None,
        layer_cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T E"], LayerCache | None]:
        """The activations after the block, and its cache."""
        c = self.config
        std = c.init.hidden_std(c.width)
        out_std = std / (2 * c.depth) ** 0.5
        scale = c.init.attention_scale(c.attention.head_dim or c.width // c.attention.heads)
        drop = partial(Dropout(c.dropout), deterministic=self.deterministic)
        attention = AttentionLayer(
            c.attention,
            self.kind,
            self.kind.positions or c.positions,
            scale,
            std,
            out_std,
            c.dtypes,
            name="attention",
        )
        y = Norm(c.norm, c.dtypes, name="attention_norm")(x)
        y, layer_cache = attention(y, segment_ids, positions, cache, layer_cache, self.deterministic)
        x = x + drop(y)
        y = Norm(c.norm, c.dtypes, name="feed_forward_norm")(x)
        y = FeedForward(c.feed_forward, std, out_std, c.dtypes, name="feed_forward")(y)
        return x + drop(y), layer_cache


class Period(nn.Module):
    """One block for each kind of a pattern, in order."""

    config: BlockConfig
    kinds: tuple[Kind, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x, layer_caches, segment_ids, positions, cache):
        """The activations after these blocks, and their caches."""
        new_caches = []
        for i, kind in enumerate(self.kinds):
            block = Block(self.config, kind, self.deterministic, name=f"block{i}")
            x, new_cache = block(x, segment_ids, positions, cache, layer_caches and layer_caches[i])
            new_caches.append(new_cache)
        return x, tuple(new_caches) if layer_caches is not None else None


class Stack(nn.Module):
    """`depth` blocks whose kinds repeat `pattern`: whole periods stacked and scanned over, the rest after them.

    Parameters lie the same way whether the scan is a loop or unrolled, so one checkpoint fits both.
    """

    config: BlockConfig
    pattern: tuple[Kind, ...]
    scan: bool
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(self, x, layer_caches, segment_ids, positions, cache, deterministic: bool):
        """The activations after all blocks, and their caches as `caches` lays them out."""
        periods, rest = divmod(self.config.depth, len(self.pattern))
        scanned, tail = layer_caches if layer_caches is not None else (None, None)
        body = Period
        if self.remat != "none":
            body = nn.remat(Period, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        if periods:
            loop = nn.scan(
                body,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=periods,
                unroll=1 if self.scan else periods,
            )
            stack = loop(self.config, self.pattern, deterministic, name="periods")
            x, scanned = stack(x, scanned, segment_ids, positions, cache)
        if rest:
            x, tail = body(self.config, self.pattern[:rest], deterministic, name="tail")(
                x, tail, segment_ids, positions, cache
            )
        return x, (scanned, tail) if layer_caches is not None else None
