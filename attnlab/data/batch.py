"""Examples, chunks, packed rows and batches."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from attnlab.errors import InputError


class Example(NamedTuple):
    """One encoded document before chunking and packing: 1-D arrays of the same length n."""

    tokens: np.ndarray
    """Input token ids, integers (n,)."""
    targets: np.ndarray
    """Target token ids, integers (n,)."""
    weights: np.ndarray
    """Loss weight of each target, floats (n,); 0 excludes it."""
    num_bytes: np.ndarray
    """UTF-8 bytes of text that each target covers, numbers (n,)."""
    source: np.ndarray | None = None
    """Encoder input: token ids, integers (s,); image or audio features, floats (s, ...)."""


class Batch(NamedTuple):
    """B rows of T tokens as NumPy arrays; a pytree. A single row has no dimension B."""

    tokens: np.ndarray
    """Input token ids, int32 (B, T); 0 at padding."""
    targets: np.ndarray
    """Target token ids, int32 (B, T); 0 at padding."""
    weights: np.ndarray
    """Loss weight of each target, float32 (B, T); 0 at padding."""
    segments: np.ndarray
    """Id of the packed document of each token, int32 (B, T): 1, 2, 3, ...; 0 is padding."""
    positions: np.ndarray
    """Position of a token in its segment, int32 (B, T), from 0; 0 at padding."""
    num_bytes: np.ndarray
    """UTF-8 bytes of text that the weighted targets of a row cover, float32 (B,)."""
    source: np.ndarray | None = None
    """Encoder input: int32 (B, S) token ids, or float32 (B, S, ...) images or audio features."""
    source_segments: np.ndarray | None = None
    """1 at the source of a row and 0 at its padding, int32 (B, S); None without a source."""
    lengths: np.ndarray | None = None
    """Number of tokens of a row with one document, int32 (B,); None if rows are packed."""
    source_lengths: np.ndarray | None = None
    """Length of the source of a row without its padding, int32 (B,); None without a source."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model.

        Lengths replace segment ids where there are any, since more attention backends support them.
        """
        segments = self.segments if self.lengths is None else self.lengths
        named: dict[str, Any] = {"tokens": self.tokens, "segment_ids": segments, "positions": self.positions}
        if self.source is not None:
            padding = self.source_segments if self.source_lengths is None else self.source_lengths
            named |= {"source": self.source, "source_segments": padding}
        return named

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        """Apply a function to each array."""
        mapped: Any = (None if array is None else function(array) for array in self)
        return Batch(*mapped)


def source_kind(source_shape: tuple[int, ...] | None) -> Literal["text", "audio", "image"] | None:
    """Return the kind of a source of shape: tokens (S,), frames (S, mels) or image (H, W, C)."""
    if source_shape is None:
        return None
    return {1: "text", 2: "audio"}.get(len(source_shape), "image")  # type: ignore[return-value]


Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


def batch_spec(
    num_rows: int, length: int, source_shape: tuple[int, ...] | None = None, packed: bool = True
) -> Spec:
    """Return shape and dtype of every array of a batch of `num_rows` rows of `length` tokens.

    Args:
      num_rows: B.
      length: T.
      source_shape: the largest shape of the source of a row; None without sources.
      packed: whether a row may hold several documents; rows with a source hold one.
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
        arrays["source_lengths"] = ((num_rows,), integer)
    if not packed or source_shape is not None:
        arrays["lengths"] = ((num_rows,), integer)
    return arrays


def batch_from_spec(spec: Spec, make: Callable[[tuple[int, ...], np.dtype], Any]) -> Batch:
    """Return a batch whose arrays are `make(shape, dtype)`."""
    return Batch(**{name: make(*array) for name, array in spec.items()})


def split_example(example: Example, length: int) -> list[Example]:
    """Split an example into chunks of at most `length`, with each target in exactly one chunk.

    An example that fits in a row is not split. In next-token prediction the inputs are one token
    behind the targets, so a chunk begins with the last target of the previous chunk.

    Raises:
      InputError: the example is empty or its arrays differ in length.
    """
    arrays = _arrays(example)
    return [Example(*(a[at : at + length] for a in arrays)) for at in range(0, len(arrays[0]), length)]


def _arrays(example: Example) -> list[np.ndarray]:
    """Return the arrays of an example without its source, after checking their lengths."""
    named = {name: np.asarray(array) for name, array in example._asdict().items() if name != "source"}
    lengths = {len(array) for array in named.values()}
    if len(lengths) != 1 or 0 in lengths:
        lengths_text = ", ".join(f"{name} {len(array)}" for name, array in named.items())
        raise InputError(
            f"encode() must return arrays of the same length, at least 1; it returned {lengths_text}"
        )
    return list(named.values())


def pack_row(examples: Sequence[Example], length: int) -> Batch:
    """Concatenate examples to a row of `length` tokens, one segment per example."""
    row = batch_from_spec(batch_spec(1, length), lambda shape, dtype: np.zeros(shape[1:], dtype))
    counts, at = np.arange(length), 0
    for segment, example in enumerate(examples, start=1):
        here = slice(at, at + len(example.tokens))
        row.tokens[here] = example.tokens
        row.targets[here] = example.targets
        row.weights[here] = example.weights
        row.segments[here] = segment
        row.positions[here] = counts[: len(example.tokens)]
        row.num_bytes[...] += np.sum(example.num_bytes, where=example.weights > 0)
        at = here.stop
    return row


def unpacked_row(example: Example, length: int, source_shape: tuple[int, ...] | None) -> Batch:
    """Return a row of `length` tokens with a single example and its source.

    Raises:
      InputError: the example or its source does not fit.
    """
    arrays = _arrays(example)
    if len(arrays[0]) > length:
        raise InputError(
            f"encode() returned {len(arrays[0])} tokens, but a row has data.sequence_length={length}"
        )
    row = pack_row([Example(*arrays)], length)._replace(lengths=np.asarray(len(arrays[0]), np.int32))
    if source_shape is None:
        return row
    source = np.asarray(example.source)
    if source.shape[1:] != source_shape[1:] or len(source) > source_shape[0]:
        raise InputError(f"encode() returned a source of {source.shape}; the largest is {source_shape}")
    room = [(0, source_shape[0] - len(source))]
    padded = np.pad(source, room + [(0, 0)] * (source.ndim - 1))
    dtype = np.int32 if source.ndim == 1 else np.float32
    source_segments = np.pad(np.ones(len(source), np.int32), room)
    return row._replace(
        source=padded.astype(dtype),
        source_segments=source_segments,
        source_lengths=np.asarray(len(source), np.int32),
    )


def stack_rows(rows: Sequence[Batch], num_rows: int) -> Batch:
    """Stack rows to a batch of `num_rows` rows, and add empty rows if there are fewer."""
    rows = [*rows, *[rows[0].map(np.zeros_like)] * (num_rows - len(rows))]
    fields: Any = zip(*rows, strict=True)
    stacked: Any = (None if arrays[0] is None else np.stack(arrays) for arrays in fields)
    return Batch(*stacked)
