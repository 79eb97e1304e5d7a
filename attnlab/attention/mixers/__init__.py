"""Alternatives to softmax attention over all pairs: linear, delta-rule and block-sparse mixers."""

from attnlab.attention.mixers.delta_rule import gated_delta_rule
from attnlab.attention.mixers.linear import gated_linear_attention, linear_attention, retention
from attnlab.attention.mixers.moba import moba
from attnlab.attention.mixers.native_sparse import nsa

__all__ = [
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_attention",
    "moba",
    "nsa",
    "retention",
]
