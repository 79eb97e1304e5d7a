"""The attention mechanism as pure functions on arrays."""

from attnlab.attention.dispatch import attend, causal_pairs
from attnlab.attention.masks import Mask, causal, segments, window
from attnlab.attention.reference import reference
from attnlab.attention.scores import softcap

__all__ = ["Mask", "attend", "causal", "causal_pairs", "reference", "segments", "softcap", "window"]
