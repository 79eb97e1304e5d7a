"""Flax modules that declare parameters and call functions of `attnlab.attention`."""

from attnlab.layers.alignment import Additive, Dot, General, NoAttention
from attnlab.layers.attention import (
    Attention,
    Bidirectional,
    Causal,
    Kind,
    NoPositions,
    RelativeBias,
    Rotary,
    Sliding,
)
from attnlab.layers.experts import Experts
from attnlab.layers.feed_forward import MLP, GatedMLP
from attnlab.layers.initialization import MuP, Normal
from attnlab.layers.norms import LayerNorm, RMSNorm
from attnlab.layers.parameters import Dtypes
from attnlab.layers.recurrent import GRU, LSTM

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "Additive",
    "Attention",
    "Bidirectional",
    "Causal",
    "Dot",
    "Dtypes",
    "Experts",
    "GatedMLP",
    "General",
    "Kind",
    "LayerNorm",
    "MuP",
    "NoAttention",
    "NoPositions",
    "Normal",
    "RMSNorm",
    "RelativeBias",
    "Rotary",
    "Sliding",
]
