"""What a document becomes: an example, its chunks, a packed row, a batch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from attnlab.errors import InputError


class Example(NamedTuple):
    """One document ready to learn from, before chunking and packing: four 1-D arrays of one length."""

    tokens: np.ndarray
    """What the model reads, integers (n,)."""
    targets: np.ndarray
    """What each position must predict, integers (n,)."""
    weights: np.ndarray
    """How much each target counts, floats (n,); 0 leaves it out."""
    num_bytes: np.ndarray
    """UTF-8 bytes of text that each target stands for, numbers (n,)."""
    source: np.ndarray | None = None
    """What is read beside the tokens: other tokens, integers (s,); an image or a sound, floats (s, ...)."""


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
    source: np.ndarray | None = None
    """What a row reads beside its tokens, int32 (B, S) of tokens, float32 (B, S, ...) of all else."""
    source_segments: np.ndarray | None = None
    """1 where the source of a row is, 0 where it is padding, int32 (B, S); None without a source."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model."""
        named = {"tokens": self.tokens, "segment_ids": self.segments, "positions": self.positions}
        if self.source is not None and self.source_segments is not None:
            named |= {"source": self.source, "source_segments": self.source_segments}
        return named

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        """A function applied to each array."""
        mapped: Any = (None if array is None else function(array) for array in self)
        return Batch(*mapped)


def source_kind(source_shape: tuple[int, ...] | None) -> Literal["text", "audio", "image"] | None:
    """Return the kind of a source by its shape: tokens (S,), frames (S, mels) or an image (H, W, C)."""
    if source_shape is None:
        return None
    return {1: "text", 2: "audio"}.get(len(source_shape), "image")  # type: ignore[return-value]


Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


def batch_spec(num_rows: int, length: int, source_shape: tuple[int, ...] | None = None) -> Spec:
    """Shape and dtype of every array of a batch of `num_rows` rows of `length` tokens.

    Args:
      num_rows: B.
      length: T.
      source_shape: of the source of a row, its first dimension the most that it may have; None without one.
    """
    integer, number = np.dtype(np.int32), np.dtype(np.float32)
    tokens = (num_rows, length)
    arrays: Spec = {
        "tokens": (tokens, integer),
        "targets": (tokens, integer),
        "weights": (tokens, number),
        "segments": (tokens, integer),
        "positions": (tokens, integer),
        "num_bytes": ((num_rows,), number),
    }
    if source_shape is not None:
        dtype = integer if source_kind(source_shape) == "text" else number
        arrays["source"] = ((num_rows, *source_shape), dtype)
        arrays["source_segments"] = ((num_rows, source_shape[0]), integer)
    return arrays


def batch_from_spec(spec: Spec, make: Callable[[tuple[int, ...], np.dtype], Any]) -> Batch:
    """A batch of what is made of each shape and dtype."""
    return Batch(**{name: make(*array) for name, array in spec.items()})


def split_example(example: Example, length: int) -> list[Example]:
    """Cut an example into pieces of at most `length`, so that each target is in exactly one of them.

    An example that fits in a row stays whole. In next-token prediction the inputs run one
    behind the targets, so a piece begins with the last token that the piece before predicted.
    Raises `InputError` if the example is empty or its arrays differ in length.
    """
    arrays = _arrays(example)
    return [Example(*(a[at : at + length] for a in arrays)) for at in range(0, len(arrays[0]), length)]


def _arrays(example: Example) -> list[np.ndarray]:
    """The arrays of an example but its source, checked."""
    named = {name: np.asarray(array) for name, array in example._asdict().items() if name != "source"}
    lengths = {len(array) for array in named.values()}
    if len(lengths) != 1 or 0 in lengths:
        lengths_text = ", ".join(f"{name} {len(array)}" for name, array in named.items())
        raise InputError(f"encode() must return arrays of one length, at least 1; it returned {lengths_text}")
    return list(named.values())


def pack_row(examples: Sequence[Example], length: int) -> Batch:
    """Lay examples one after the other into a row of `length` tokens, a segment each."""
    row = batch_from_spec(batch_spec(1, length), lambda shape, dtype: np.zeros(shape[1:], dtype))
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


def unpacked_row(example: Example, length: int, source_shape: tuple[int, ...] | None) -> Batch:
    """A row of `length` tokens of one example alone, with its source.

    Raises:
      InputError: an example or a source that does not fit.
    """
    arrays = _arrays(example)
    if len(arrays[0]) > length:
        raise InputError(
            f"encode() returned {len(arrays[0])} tokens, and data.sequence_length={length} is a whole row"
        )
    row = pack_row([Example(*arrays)], length)
    if source_shape is None:
        return row
    source = np.asarray(example.source)
    if source.shape[1:] != source_shape[1:] or len(source) > source_shape[0]:
        raise InputError(f"encode() returned a source of {source.shape}; there is room for {source_shape}")
    room = [(0, source_shape[0] - len(source))]
    padded = np.pad(source, room + [(0, 0)] * (source.ndim - 1))
    dtype = np.int32 if source.ndim == 1 else np.float32
    source_segments = np.pad(np.ones(len(source), np.int32), room)
    return row._replace(source=padded.astype(dtype), source_segments=source_segments)


def stack_rows(rows: Sequence[Batch], num_rows: int) -> Batch:
    """Stack rows to a batch of `num_rows`, the missing ones empty."""
    rows = [*rows, *[rows[0].map(np.zeros_like)] * (num_rows - len(rows))]
    fields: Any = zip(*rows, strict=True)
    stacked: Any = (None if arrays[0] is None else np.stack(arrays) for arrays in fields)
    return Batch(*stacked)
