"""Speech to text: numbers that a synthesiser says, written in words by a small Whisper.

Eight voices of espeak-ng say the numbers from 0 to 999, at speeds and pitches of their own each time. A fifth
of the numbers is never heard in training; their words are, in other numbers.

Claim: of the words of numbers never heard, at least 95% are written right (1 - word error rate).
Source: Whisper (Radford et al. 2022, arXiv 2212.04356, section 2.2), made small.
Command: python run.py --config=speech (needs the extra `speech`)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from attnlab.data import Data, Example, Tokenizer, Words
from attnlab.data.audio import LogMel
from attnlab.data.builtin.espeak import Voice, speak
from attnlab.generation import SamplingParams
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, LayerNormConfig
from attnlab.models import DecoderConfig, Learned, Seq2SeqConfig, SpeechEncoderConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Experiment, Train

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VOICES = "en en+m3 en+m7 en+f1 en+f3 en-us en-us+f2 en-us+m4".split()
FEATURES = LogMel(mels=40, chunk_seconds=2)
COUNT = {"train": 4000, "validation": 400}


def words(number: int) -> str:
    """A number below 1000 in words, 342 as three hundred forty two."""
    hundreds, rest = divmod(number, 100)
    found = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        found.append(TENS[rest // 10 - 2])
        rest %= 10
    if rest or not found:
        found.append(ONES[rest])
    return " ".join(found)


class Utterance(NamedTuple):
    """A number, and how it is said."""

    text: str
    voice: Voice


@dataclass(frozen=True, kw_only=True)
class Numbers(Data):
    """Spoken numbers and their words."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 8

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Two seconds."""
        return FEATURES.frames, FEATURES.mels

    @property
    def preprocessor(self) -> dict[str, Any]:
        """See `Data.preprocessor`."""
        return FEATURES.settings()

    def records(self, split: str) -> list[Utterance]:
        """Random numbers, said in random ways."""
        rng = np.random.default_rng(split == "train")
        held_out = np.random.default_rng(0).permutation(1000) < 200
        numbers = np.flatnonzero(held_out == (split == "validation"))
        return [
            Utterance(
                words(int(rng.choice(numbers))),
                Voice(str(rng.choice(VOICES)), int(rng.integers(200, 300)), int(rng.integers(35, 65))),
            )
            for _ in range(COUNT[split])
        ]

    def text(self, record: Utterance) -> str:
        """The words alone."""
        return record.text

    def encode(self, record: Utterance, tokenizer: Tokenizer) -> Example:
        """The words, beside the sound."""
        return super().encode(record, tokenizer)._replace(source=features(record))


@cache
def _features():
    return jax.jit(FEATURES)


def features(record: Utterance) -> np.ndarray:
    """What a model hears, (frames, mels)."""
    sound = speak(*record)[: FEATURES.samples]
    return np.asarray(_features()(np.pad(sound, (0, FEATURES.samples - len(sound)))[None])[0])


def get_config() -> Experiment:
    """An encoder and a decoder of two layers."""
    half = {
        "depth": 2,
        "width": 128,
        "attention": AttentionConfig(heads=4, bias="qvo"),
        "norm": LayerNormConfig(),
    }
    return Experiment(
        model=Seq2SeqConfig(
            SpeechEncoderConfig(mels=FEATURES.mels, frames=FEATURES.frames, **half),
            DecoderConfig(positions=Learned(8), **half),
        ),
        data=Numbers(batch_size=32),
        optimizer=AdamW(learning_rate=1.5e-3),
        train=Train(steps=900, eval_every=300, checkpoint_every=300, log_every=50),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """How many words, and numbers, are written right; and where each word of one was heard."""
    records = trained.experiment.data.records("validation")
    sounds = [features(record) for record in records]
    heard = trained.generator()(sources=sounds, sampling=SamplingParams(0.0), max_new_tokens=7)
    pairs = [(record.text.split(), row.text.split()) for record, row in zip(records, heard, strict=True)]
    faults = sum(distance(said, written) for said, written in pairs)
    found = {
        "words": 1 - faults / sum(len(said) for said, _ in pairs),
        "numbers": float(np.mean([said == written for said, written in pairs])),
    }
    trained.log(
        f"of numbers never heard {found['words']:.1%} of words are right, {found['numbers']:.1%} whole"
    )
    trained.claim("words of unheard numbers right", found["words"], ">=", 0.95)
    _picture(trained)
    return found


def distance(one: list[str], other: list[str]) -> int:
    """Words to add, drop or change that make one text the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(one):
        before, row = row, [i + 1]
        for j, found in enumerate(other):
            row.append(min(before[j] + (word != found), before[j + 1] + 1, row[j] + 1))
    return row[-1]


def _picture(trained: TrainedModel) -> None:
    """Where the decoder looks in the sound of one number as it writes each word."""
    batch = trained.batches("validation", limit=1)[0]
    row = int(batch.weights.sum(axis=1).argmax())
    length = int(batch.weights[row].sum())
    weights = trained.attention(batch, "decoder/layers", "cross_attention")[:, row, :, :length]
    written = [trained.tokenizer.token_text(i) for i in batch.targets[row, :length]]
    times = [f"{i / 50:.2f} s" for i in range(weights.shape[-1])]
    trained.save_figure(figures.head_grid(weights, written, "Where each word is heard", times), "heard")
