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
from attnlab.layers.attention import AttentionConfig
from attnlab.layers.blocks import (
    BlockConfig,
    CrossAttentionConfig,
    GatedCrossAttentionConfig,
    PerceiverAttentionConfig,
)
from attnlab.layers.cross_attention import CrossAttention, PerceiverAttention
from attnlab.layers.experts import Experts, ExpertsConfig
from attnlab.layers.linear import Dtypes, Embedding, Linear, MuP, Normal
from attnlab.layers.mixers import (
    Differential,
    GatedOutput,
    LatentAttention,
    TalkingHeads,
    ValueResidual,
)
from attnlab.layers.multi_head import Attention
from attnlab.layers.normalizers import (
    Entmax,
    LayerNormalizer,
    Sigmoid,
    SoftmaxOne,
    Sparsemax,
    TopK,
)
from attnlab.layers.position_wise import (
    MLP,
    GatedMLP,
    GatedMLPConfig,
    LayerNorm,
    LayerNormConfig,
    MLPConfig,
    RMSNorm,
    RMSNormConfig,
)
from attnlab.layers.recurrent import GRUConfig, LSTMConfig
from attnlab.layers.remat import Save
from attnlab.layers.scores import (
    ALiBi,
    CoPE,
    FoX,
    LayerScore,
    ScoreInputs,
    Selective,
    Shaw,
    Softcap,
    T5Bias,
    Temperature,
)
from attnlab.layers.specs import (
    Bidirectional,
    Causal,
    LayerSpec,
    Mixer,
    NoPositions,
    RelativeBias,
    Rotary,
    Sliding,
)

__all__ = [
    "MLP",
    "ALiBi",
    "AdditiveAttention",
    "AdditiveConfig",
    "Attention",
    "AttentionConfig",
    "Bidirectional",
    "BlockConfig",
    "Causal",
    "CoPE",
    "CrossAttention",
    "CrossAttentionConfig",
    "Differential",
    "DotConfig",
    "Dtypes",
    "Embedding",
    "Entmax",
    "Experts",
    "ExpertsConfig",
    "FoX",
    "GRUConfig",
    "GatedCrossAttentionConfig",
    "GatedMLP",
    "GatedMLPConfig",
    "GatedOutput",
    "GeneralConfig",
    "LSTMConfig",
    "LatentAttention",
    "LayerNorm",
    "LayerNormConfig",
    "LayerNormalizer",
    "LayerScore",
    "LayerSpec",
    "Linear",
    "MLPConfig",
    "Mixer",
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
    "Rotary",
    "Save",
    "ScoreInputs",
    "Selective",
    "Shaw",
    "Sigmoid",
    "Sliding",
    "Softcap",
    "SoftmaxOne",
    "Sparsemax",
    "T5Bias",
    "TalkingHeads",
    "Temperature",
    "TopK",
    "ValueResidual",
]
