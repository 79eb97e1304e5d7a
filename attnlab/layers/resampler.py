"""A memory of any length as one of a few latents (Flamingo, arXiv 2204.14198, section 3.1.1)."""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from attnlab.layers.attention import Bidirectional, EncoderOutput, NoPositions, SequenceInputs
from attnlab.layers.blocks import BlockConfig, LayerStack, PerceiverAttentionConfig
from attnlab.layers.linear import Embedding
from attnlab.sharding import constrain


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler, as wide as what it reads.

    Attributes:
      latents: learned vectors that look at the memory, and take its place.
      depth: how many times they do, each followed by a feed-forward layer.
    """

    latents: int = 64
    depth: int = 6

    def __post_init__(self):
        if self.latents < 1 or self.depth < 1:
            raise ValueError("latents and depth must be at least 1")


class Resampler(nn.Module):
    """Applies the resampler that `config` describes.

    Attributes:
      config: its size.
      block: what its blocks have in common with those of the model that made the memory.
      scan: see `LayerStack`.
      remat: see there.
    """

    config: ResamplerConfig
    block: BlockConfig
    scan: bool
    remat: Literal["none", "full", "dots"]

    @nn.compact
    def __call__(self, memory: EncoderOutput, deterministic: bool = True) -> EncoderOutput:
        """A memory of one document, the latents after their last look at those of its document 1."""
        c, block, rows = self.config, self.block, memory.hidden.shape[0]
        table = Embedding(c.latents, block.width, ("sequence", "embed"), block.init.std, block.dtypes)
        x = jnp.broadcast_to(table()[None], (rows, c.latents, block.width))
        x = constrain(x, "batch", "sequence", None)
        block = replace(block, depth=c.depth, positions=NoPositions(), cross=PerceiverAttentionConfig())
        segments: Int[Array, "B R"] = constrain(jnp.ones(x.shape[:2], jnp.int32), "batch", "sequence")
        stack = LayerStack(block, (Bidirectional(),), self.scan, self.remat, name="layers")
        x, _ = stack(
            x, None, SequenceInputs(segments, jnp.zeros_like(segments), memory=memory), deterministic
        )
        if block.placement != "post":  # else the last block has ended with one
            x = block.norm.build(block.dtypes, name="norm")(x)
        return EncoderOutput(x, segments)
