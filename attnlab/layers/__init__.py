"""Flax modules that declare parameters and call functions of `attnlab.attention`."""

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

__all__ = [
    "MLP",
    "Attention",
    "Bidirectional",
    "Causal",
    "Dtypes",
    "Experts",
    "GatedMLP",
    "Kind",
    "LayerNorm",
    "MuP",
    "NoPositions",
    "Normal",
    "RMSNorm",
    "RelativeBias",
    "Rotary",
    "Sliding",
]
