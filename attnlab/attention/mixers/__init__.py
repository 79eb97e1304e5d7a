"""Sequence mixers that replace softmax attention."""
