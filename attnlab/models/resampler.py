"""Perceiver resampler: a few latents that attend to an encoder output of any length.

Flamingo, arXiv 2204.14198, section 3.1.1.
"""

from dataclasses import dataclass, replace

import flax.linen as nn
import jax.numpy as jnp

from attnlab.layers.attention import EncoderOutput, SequenceInputs, documents
from attnlab.layers.blocks import BlockConfig, LayerStack, PerceiverAttentionConfig
from attnlab.layers.linear import Embedding
from attnlab.layers.remat import Remat
from attnlab.layers.specs import Bidirectional, NoPositions
from attnlab.models.decoder import Block
from attnlab.sharding import constrain


@dataclass(frozen=True)
class ResamplerConfig:
    """Config of a Perceiver resampler, which has the width of its encoder.

    Attributes:
      latents: number of learned latents, the length of the resampled output.
      depth: number of layers, each of attention and feed-forward.
    """

    latents: int = 64
    depth: int = 6

    def __post_init__(self):
        if self.latents < 1 or self.depth < 1:
            raise ValueError(f"latents={self.latents} and depth={self.depth} must be at least 1")


class Resampler(nn.Module):
    """A Perceiver resampler.

    Attributes:
      config: see `ResamplerConfig`.
      block: settings of the encoder's blocks, also used for those of the resampler.
      scan: see `LayerStack`.
      remat: see `LayerStack`.
    """

    config: ResamplerConfig
    block: BlockConfig
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(self, memory: EncoderOutput, deterministic: bool = True) -> EncoderOutput:
        """Return the latents after the last layer, as one document.

        They attend to document 1 of `memory`.
        """
        c, block, batch = self.config, self.block, memory.hidden.shape[0]
        table = Embedding(c.latents, block.width, ("sequence", "embed"), block.init.std, block.dtypes)
        x = jnp.broadcast_to(table()[None], (batch, c.latents, block.width))
        x = constrain(x, "batch", "residual", None)
        block = replace(block, depth=c.depth, positions=NoPositions(), cross=PerceiverAttentionConfig())
        rows = documents(None, x[..., 0])
        stack = LayerStack(Block, block, (Bidirectional(),), self.scan, self.remat, name="layers")
        x, _ = stack(x, None, SequenceInputs(rows, jnp.zeros_like(rows.ids), memory=memory), deterministic)
        if block.placement != "post":  # with "post", the last block already ends with a norm
            x = block.norm.build(block.dtypes, name="norm")(x)
        return EncoderOutput(x, rows)
