"""Datasets small enough to check by hand."""

from dataclasses import dataclass

import numpy as np

from attnlab.data import Bytes, Data, Example, Words


@dataclass(frozen=True, kw_only=True)
class Documents(Data):
    """Text data of the given documents."""

    tokenizer: Bytes = Bytes()  # noqa: RUF009
    documents: tuple[str, ...] = ()

    def records(self, split):
        return [{"text": text} for text in self.documents]


@dataclass(frozen=True, kw_only=True)
class LastWord(Data):
    """Sentences whose last word is replaced by `<eos>` and is the only weighted target."""

    tokenizer: Words = Words()  # noqa: RUF009
    count: int = 40

    def records(self, split):
        return [{"text": " ".join(["a"] * (i % 5 + 1)) + f" w{i}"} for i in range(self.count)]

    def encode(self, record, tokenizer):
        targets = tokenizer.encode(record["text"])
        weights = np.zeros(len(targets))
        weights[-1] = 1
        tokens = np.where(weights, tokenizer.eos_id, targets)
        return Example(tokens, targets, weights, tokenizer.token_bytes[targets])


@dataclass(frozen=True, kw_only=True)
class Images(Data):
    """Images of noise whose mean is the class index."""

    tokenizer: Words = Words()  # noqa: RUF009
    sequence_length: int = 1
    image: tuple[int, int, int] = (12, 20, 3)

    @property
    def source_shape(self):
        return self.image

    def records(self, split):
        return [{"text": f"class{i % 3}", "bright": i % 3, "seed": i} for i in range(24)]

    def encode(self, record, tokenizer):
        (target,) = tokenizer.encode(record["text"])
        image = np.random.default_rng(record["seed"]).normal(record["bright"], 1.0, self.image)
        return Example(np.zeros(1), np.array([target]), np.ones(1), np.zeros(1), image)


@dataclass(frozen=True, kw_only=True)
class Sounds(Data):
    """Sequences of noise frames, with one target word per two frames."""

    tokenizer: Words = Words()  # noqa: RUF009
    sequence_length: int = 8

    @property
    def source_shape(self):
        return (8, 4)

    def records(self, split):
        return [{"text": "loud " * (i % 4 + 1), "seed": i} for i in range(24)]

    def encode(self, record, tokenizer):
        count = record["text"].count("loud")
        frames = np.random.default_rng(record["seed"]).normal(size=(2 * count, 4)) + 3
        return super().encode(record, tokenizer)._replace(source=frames)


def segments(batch):
    """Yield the (tokens, targets, weights, positions) of each segment of a batch."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            at = batch.segments[row] == segment
            yield tuple(
                field[row][at] for field in (batch.tokens, batch.targets, batch.weights, batch.positions)
            )


def assert_equal(left, right):
    for name, a, b in zip(left._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
