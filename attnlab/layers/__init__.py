"""Flax modules that declare parameters and call `attnlab.attention`, and their configs.

A configurable module `X` takes an `XConfig`, which is named `X` on the command line.
"""

from attnlab.layers.alignment import (
    AdditiveAttention,
    AdditiveConfig,
    DotConfig,
    GeneralConfig,
    MultiplicativeAttention,
    NoAttention,
)
from attnlab.layers.attention import (
    Attention,
    AttentionConfig,
    Bidirectional,
    Causal,
    CrossAttention,
    LayerSpec,
    NoPositions,
    PerceiverAttention,
    RelativeBias,
    Rotary,
    Sliding,
)
from attnlab.layers.blocks import (
    Block,
    BlockConfig,
    CrossAttentionConfig,
    GatedCrossAttentionConfig,
    PerceiverAttentionConfig,
)
from attnlab.layers.experts import Experts, ExpertsConfig
from attnlab.layers.feed_forward import MLP, GatedMLP, GatedMLPConfig, MLPConfig
from attnlab.layers.initialization import MuP, Normal
from attnlab.layers.linear import Embedding, Linear
from attnlab.layers.norms import LayerNorm, LayerNormConfig, RMSNorm, RMSNormConfig
from attnlab.layers.parameters import Dtypes
from attnlab.layers.recurrent import GRUConfig, LSTMConfig
from attnlab.layers.resampler import Resampler, ResamplerConfig

__all__ = [
    "MLP",
    "AdditiveAttention",
    "AdditiveConfig",
    "Attention",
    "AttentionConfig",
    "Bidirectional",
    "Block",
    "BlockConfig",
    "Causal",
    "CrossAttention",
    "CrossAttentionConfig",
    "DotConfig",
    "Dtypes",
    "Embedding",
    "Experts",
    "ExpertsConfig",
    "GRUConfig",
    "GatedCrossAttentionConfig",
    "GatedMLP",
    "GatedMLPConfig",
    "GeneralConfig",
    "LSTMConfig",
    "LayerNorm",
    "LayerNormConfig",
    "LayerSpec",
    "Linear",
    "MLPConfig",
    "MuP",
    "MultiplicativeAttention",
    "NoAttention",
    "NoPositions",
    "Normal",
    "PerceiverAttention",
    "PerceiverAttentionConfig",
    "RMSNorm",
    "RMSNormConfig",
    "RelativeBias",
    "Resampler",
    "ResamplerConfig",
    "Rotary",
    "Sliding",
]
