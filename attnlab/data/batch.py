"""What a document becomes: an example, its chunks, a packed row, a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attnlab.errors import InputError


class Example(NamedTuple):
    """One document ready to learn from: four 1-D arrays of one length, before chunking and packing."""

    tokens: np.ndarray
    """What the model reads, integers (n,)."""
    targets: np.ndarray
    """What each position must predict, integers (n,)."""
    weights: np.ndarray
    """How much each target counts, floats (n,); 0 leaves it out."""
    num_bytes: np.ndarray
    """UTF-8 bytes of text that each target stands for, numbers (n,)."""


class Batch(NamedTuple):
    """B rows of T tokens as NumPy arrays; a pytree. A single row is the same without the B."""

    tokens: np.ndarray
    """What the model reads, int32 (B, T); 0 at padding."""
    targets: np.ndarray
    """What each position must predict, int32 (B, T); 0 at padding."""
    weights: np.ndarray
    """How much each target counts, float32 (B, T); 0 at padding."""
    segments: np.ndarray
    """Which packed document a token belongs to, int32 (B, T): 1, 2, 3, ...; 0 is padding."""
    positions: np.ndarray
    """Place of a token inside its segment, int32 (B, T), from 0; 0 at padding."""
    num_bytes: np.ndarray
    """UTF-8 bytes of text that the weighted targets of a row stand for, float32 (B,)."""


def spec(num_rows: int, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every field of a batch of `num_rows` rows of `length` tokens."""
    dtypes = {"weights": np.float32, "num_bytes": np.float32}
    return {
        name: (
            (num_rows,) if name == "num_bytes" else (num_rows, length),
            np.dtype(dtypes.get(name, np.int32)),
        )
        for name in Batch._fields
    }


def chunks(example: Example, length: int) -> list[Example]:
    """Cut an example into pieces of at most `length`, so that each target is in exactly one of them.

    An example that fits in a row stays whole. In next-token prediction the inputs run one
    behind the targets, so a piece begins with the last token that the piece before predicted.
    Raises `InputError` if the example is empty or its arrays differ in length.
    """
    arrays = Example(*map(np.asarray, example))
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) != 1 or not lengths[0]:
        named = ", ".join(f"{name} {n}" for name, n in zip(Example._fields, lengths, strict=True))
        raise InputError(f"encode() must return arrays of one length, at least 1; it returned {named}")
    return [Example(*(a[at : at + length] for a in arrays)) for at in range(0, lengths[0], length)]


def pack_row(examples: Sequence[Example], length: int) -> Batch:
    """Lay examples one after the other into a row of `length` tokens, a segment each."""
    row = Batch(*(np.zeros(shape[1:], dtype) for shape, dtype in spec(1, length).values()))
    at = 0
    for segment, example in enumerate(examples, start=1):
        here = slice(at, at + len(example.tokens))
        row.tokens[here] = example.tokens
        row.targets[here] = example.targets
        row.weights[here] = example.weights
        row.segments[here] = segment
        row.positions[here] = np.arange(len(example.tokens))
        row.num_bytes[...] += np.sum(example.num_bytes, where=example.weights > 0)
        at = here.stop
    return row


def stack(rows: Sequence[Batch], num_rows: int) -> Batch:
    """Stack rows to a batch of `num_rows`, the missing ones empty."""
    empty = [Batch(*map(np.zeros_like, rows[0]))] * (num_rows - len(rows))
    return Batch(*(np.stack(field) for field in zip(*rows, *empty, strict=True)))
