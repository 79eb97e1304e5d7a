"""A residual block, and a run of blocks scanned over."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from attnlab.attention.cache import Cache, LayerCache
from attnlab.layers.attention import Attention, AttentionLayer, Kind, NoPositions, Rotary
from attnlab.layers.dropout import Dropout
from attnlab.layers.experts import Experts, ExpertsLayer
from attnlab.layers.feed_forward import MLP, FeedForward, GatedMLP
from attnlab.layers.initialization import Normal
from attnlab.layers.norms import LayerNorm, Norm, RMSNorm
from attnlab.layers.parameters import Dtypes

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


Placement = Literal["pre", "post", "both", "branch"]


@dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a stack share; a model's config makes one of itself.

    `placement` says where norms stand around a branch f: x + f(norm(x)) is "pre" (arXiv 2002.04745),
    norm(x + f(x)) "post" (Vaswani et al. 2017, section 3.1), x + norm(f(norm(x))) "both" (Gemma 2), and
    x + norm(f(x)) "branch" (OLMo 2, arXiv 2501.00656, section 3.2).
    """

    width: int
    depth: int
    attention: Attention
    feed_forward: MLP | GatedMLP | Experts
    norm: RMSNorm | LayerNorm
    placement: Placement
    positions: Rotary | NoPositions
    dropout: float
    init: Normal
    dtypes: Dtypes


class Block(nn.Module):
    """A residual block: a branch of attention, then one of a feed-forward layer."""

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
        turned = self.kind.positions or c.positions
        attention = AttentionLayer(
            c.attention, self.kind, turned, c.norm, scale, std, out_std, c.dtypes, name="attention"
        )
        self.sow("intermediates", "hidden", x)

        y = self._before(x, "attention")
        y, layer_cache = attention(y, segment_ids, positions, cache, layer_cache, self.deterministic)
        x = self._add(x, y, "attention")
        y = self._before(x, "feed_forward")
        if isinstance(c.feed_forward, Experts):
            experts = ExpertsLayer(c.feed_forward, std, out_std, c.dtypes, name="feed_forward")
            y = experts(y, segment_ids > 0)
        else:
            y = FeedForward(c.feed_forward, std, out_std, c.dtypes, name="feed_forward")(y)
        return self._add(x, y, "feed_forward"), layer_cache

    def _before(self, x: Float[Array, "B T E"], branch: str) -> Float[Array, "B T E"]:
        """What a branch reads of the residual stream."""
        return self._norm(x, branch) if self.config.placement in ("pre", "both") else x

    def _add(self, x: Float[Array, "B T E"], y: Float[Array, "B T E"], branch: str) -> Float[Array, "B T E"]:
        """The residual stream with a branch's result in it."""
        c = self.config
        if c.placement in ("both", "branch"):
            y = self._norm(y, f"{branch}_out")
        x = x + Dropout(c.dropout)(y, deterministic=self.deterministic)
        return self._norm(x, branch) if c.placement == "post" else x

    def _norm(self, x: Float[Array, "B T E"], name: str) -> Float[Array, "B T E"]:
        return Norm(self.config.norm, self.config.dtypes, name=f"{name}_norm")(x)


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
    """`depth` blocks whose kinds repeat `pattern`: whole periods are scanned over, the rest come after them.

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

        def body(looped: bool):
            if self.remat == "none":
                return Period
            # Inside a loop XLA cannot merge the recomputation with what it recomputes; elsewhere it would.
            return nn.remat(Period, policy=REMAT_POLICIES[self.remat], prevent_cse=not looped)

        if periods:
            loop = nn.scan(
                body(looped=self.scan),
                variable_axes={"params": 0, "intermediates": 0, "losses": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=periods,
                unroll=1 if self.scan else periods,
            )
            stack = loop(self.config, self.pattern, deterministic, name="periods")
            x, scanned = stack(x, scanned, segment_ids, positions, cache)
        if rest:
            x, tail = body(looped=False)(self.config, self.pattern[:rest], deterministic, name="tail")(
                x, tail, segment_ids, positions, cache
            )
        return x, (scanned, tail) if layer_caches is not None else None
