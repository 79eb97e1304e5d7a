"""Handwritten digits, read by a Vision Transformer patch by patch.

1,797 digits of 8 by 8 pixels, in the order in which people wrote them: the last fifth, mostly of people that
training never saw, is held out. Each digit is also shown moved by a pixel to any side.

Claim: at least 95% of the held-out digits are right, where logistic regression of the pixels, its penalty the
  best of five on these very digits, is under 93%.
Source: ViT (Dosovitskiy et al., arXiv 2010.11929); the digits of Alpaydin and Kaynak (1998) in scikit-learn.
Command: python run.py --config=experiments/digits.py
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from attnlab.data import Data, Example, Tokenizer, Words
from attnlab.data.images import ImageProcessor
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, Normal
from attnlab.models import ViTConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Loss, Muon, Train, WarmupStableDecay

SIDE, INK, HELD_OUT = 8, 16, 360


class Digit(NamedTuple):
    """A picture (rows, columns, 1), ink 1 and paper 0, and what it shows."""

    image: np.ndarray
    label: int


@dataclass(frozen=True, kw_only=True)
class Digits(Data):
    """Digits as the sources of rows of one token, whose target is the word for the digit."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 1

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return SIDE, SIDE, 1

    @property
    def preprocessor(self) -> dict[str, Any]:
        """See `Data.preprocessor`."""
        return ImageProcessor(False, (SIDE, SIDE), scale=1 / INK, mean=(0.0,), std=(1.0,)).settings()

    def records(self, split: str) -> list[Digit]:
        """The last digits for validation, the others, moved too, to train on."""
        from sklearn.datasets import load_digits  # takes a second

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, SIDE, SIDE, 1) / INK
        digits = [Digit(image, int(label)) for image, label in zip(images, labels, strict=True)]
        if split == "validation":
            return digits[-HELD_OUT:]
        moves = list(itertools.product((0, 1, 2), repeat=2))
        return [Digit(_moved(image, *move), label) for image, label in digits[:-HELD_OUT] for move in moves]

    def text(self, record: Digit) -> str:
        """The digit, as a word."""
        return str(record.label)

    def encode(self, record: Digit, tokenizer: Tokenizer) -> Example:
        """One token to hang the answer on."""
        answer = tokenizer.encode(self.text(record))
        return Example(np.zeros(1), answer, np.ones(1), np.zeros(1), record.image)


def _moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The picture with paper around it, cut out again at a place from (0, 0) to (2, 2)."""
    return np.pad(image, ((1, 1), (1, 1), (0, 0)))[down : down + SIDE, right : right + SIDE]


def get_config() -> Experiment:
    """Four layers over 16 patches of 2 by 2 pixels."""
    return Experiment(
        model=ViTConfig(
            depth=4,
            width=64,
            attention=AttentionConfig(heads=4, bias=True),
            image=(SIDE, SIDE, 1),
            patch=(2, 2),
            init=Normal(std=0.1),
        ),
        data=Digits(batch_size=64),
        optimizer=Muon(learning_rate=3e-3, schedule=WarmupStableDecay(warmup=20, decay=0.4)),
        loss=Loss(label_smoothing=0.1),
        train=Train(steps=800, eval_every=200, checkpoint_every=800, log_every=50),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """The share of held-out digits that are right, that of a linear model, and a picture of attention."""
    accuracy, linear = trained.metrics["accuracy"], _linear(trained.experiment.data)
    trained.log(f"right: {accuracy:.1%} of the held-out digits; {linear:.1%} by logistic regression")
    batch = trained.batches("validation", limit=1)[0]
    looks = trained.attention(batch)[-1, 0, :, 0, 1:].reshape(-1, SIDE // 2, SIDE // 2)  # of the class token
    heads = [f"head {i + 1}" for i in range(len(looks))]
    trained.save_figure(
        figures.image_overlay(batch.source[0, ..., 0], heads, looks, "Where it looks"), "looks"
    )
    trained.claim("held-out digits right", accuracy, ">=", 0.95)
    trained.claim("held-out digits right by logistic regression", linear, "<", 0.93)
    return {"accuracy": accuracy, "accuracy_linear": linear}


def _linear(data: Digits) -> float:
    """The share of held-out digits that logistic regression gets right, at its best."""
    from sklearn.linear_model import LogisticRegression

    (train, labels), (held_out, answers) = (
        (np.stack([r.image.ravel() for r in records]), [r.label for r in records])
        for records in (data.records("train")[4::9], data.records("validation"))  # not moved
    )
    models = (LogisticRegression(C=c, max_iter=5000) for c in (0.01, 0.1, 1.0, 10.0, 100.0))
    return max(float(model.fit(train, labels).score(held_out, answers)) for model in models)
