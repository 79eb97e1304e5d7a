"""Text from a model: how the next token is drawn."""

from attnlab.generation.sampling import Sampling, filter_logits, row_keys, sample

__all__ = ["Sampling", "filter_logits", "row_keys", "sample"]
