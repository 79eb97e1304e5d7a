"""Generation: sampling, the decode loop, beam search and speculative decoding."""

from attnlab.generation.beam import (
    BeamSearchOptions,
    GNMTLengthPenalty,
    Hypotheses,
    PowerLengthPenalty,
    beam_search,
)
from attnlab.generation.completion import Completion, printable
from attnlab.generation.decode_state import DecodeState, prefill
from attnlab.generation.generate import DraftModel, Generator
from attnlab.generation.sampling import SamplingParams, filter_logits, row_keys, sample
from attnlab.generation.speculative import PromptLookup

__all__ = [
    "BeamSearchOptions",
    "Completion",
    "DecodeState",
    "DraftModel",
    "GNMTLengthPenalty",
    "Generator",
    "Hypotheses",
    "PowerLengthPenalty",
    "PromptLookup",
    "SamplingParams",
    "beam_search",
    "filter_logits",
    "prefill",
    "printable",
    "row_keys",
    "sample",
]
