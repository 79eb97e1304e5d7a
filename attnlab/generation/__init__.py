"""Text from a model: how the next token is drawn, and the loop that draws it."""

from attnlab.generation.generate import Completion, Generator, printable
from attnlab.generation.sampling import Sampling, filter_logits, row_keys, sample

__all__ = ["Completion", "Generator", "Sampling", "filter_logits", "printable", "row_keys", "sample"]
