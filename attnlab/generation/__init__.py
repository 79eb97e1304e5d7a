"""Text from a model: how the next token is drawn, the loop that draws it, and search for the likeliest."""

from attnlab.generation.beam import Beams, Power, Texts, Wu, beam_search
from attnlab.generation.decode_state import Prefix, prefill
from attnlab.generation.generate import Completion, Generator, printable
from attnlab.generation.sampling import Sampling, filter_logits, row_keys, sample
from attnlab.generation.speculative import Draft, Lookup

__all__ = [
    "Beams",
    "Completion",
    "Draft",
    "Generator",
    "Lookup",
    "Power",
    "Prefix",
    "Sampling",
    "Texts",
    "Wu",
    "beam_search",
    "filter_logits",
    "prefill",
    "printable",
    "row_keys",
    "sample",
]
