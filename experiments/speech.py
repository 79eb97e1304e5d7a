"""Speech recognition: a small Whisper writes the numbers that a synthesiser speaks.

Eight voices of espeak-ng speak the numbers from 0 to 999, each time at a random speed and pitch. A
fifth of the numbers never occur in training; their words do, in other numbers.

Claim: at least 95% of the words of unheard numbers are right (1 - word error rate).
Source: Whisper (Radford et al. 2022, arXiv 2212.04356, section 2.2), made small.
Command: python run.py --config=speech (needs the extra `speech`)
Time: 2.9 minutes on 2 CPU cores.
Result: 99.4% (two seeds).
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
FRAMES_PER_SECOND = 50  # of the encoder's output
COUNT = {"train": 4000, "validation": 400}


def words(number: int) -> str:
    """Return a number below 1000 in words: 342 is "three hundred forty two"."""
    hundreds, rest = divmod(number, 100)
    result = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        result.append(TENS[rest // 10 - 2])
        rest %= 10
    if rest or not result:
        result.append(ONES[rest])
    return " ".join(result)


class Utterance(NamedTuple):
    """A number in words, and the voice that speaks it."""

    text: str
    voice: Voice


@dataclass(frozen=True, kw_only=True)
class Numbers(Data):
    """Spoken numbers, with their words as targets."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 8

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Return the shape of the features of two seconds."""
        return FEATURES.frames, FEATURES.mels

    @property
    def preprocessor(self) -> dict[str, Any]:
        """Return the settings of the audio features; see `Data.preprocessor`."""
        return FEATURES.settings()

    def records(self, split: str) -> list[Utterance]:
        """Return random numbers of the split, in random voices."""
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
        """Return the number in words."""
        return record.text

    def encode(self, record: Utterance, tokenizer: Tokenizer) -> Example:
        """Return the words, with the sound's features as their source."""
        return super().encode(record, tokenizer)._replace(source=features(record))


@cache
def _features():
    return jax.jit(FEATURES)


def features(record: Utterance) -> np.ndarray:
    """Return the log-mel features of an utterance (frames, mels)."""
    sound = speak(*record)[: FEATURES.samples]
    return np.asarray(_features()(np.pad(sound, (0, FEATURES.samples - len(sound)))[None])[0])


def get_config() -> Experiment:
    """Return an encoder and a decoder of two layers each."""
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
    """Report the words and the numbers that are right, and a figure of when each word is heard."""
    records = trained.records("validation")
    sounds = [features(record) for record in records]
    outputs = trained.generator()(sources=sounds, sampling=SamplingParams(0.0), max_new_tokens=7)
    pairs = [
        (record.text.split(), output.text.split()) for record, output in zip(records, outputs, strict=True)
    ]
    errors = sum(edit_distance(spoken, written) for spoken, written in pairs)
    accuracy = {
        "words": 1 - errors / sum(len(spoken) for spoken, _ in pairs),
        "numbers": float(np.mean([spoken == written for spoken, written in pairs])),
    }
    trained.log(
        f"accuracy on unheard numbers: words {accuracy['words']:.1%}, whole numbers {accuracy['numbers']:.1%}"
    )
    trained.claim("words of unheard numbers right", accuracy["words"], ">=", 0.95)
    _save_attention(trained)
    return accuracy


def edit_distance(words: list[str], other: list[str]) -> int:
    """Return the Levenshtein distance of two texts: insertions, deletions, substitutions."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(words):
        previous, row = row, [i + 1]
        for j, other_word in enumerate(other):
            row.append(min(previous[j] + (word != other_word), previous[j + 1] + 1, row[j] + 1))
    return row[-1]


def _save_attention(trained: TrainedModel) -> None:
    """Save the decoder's attention over the sound of one number, for each word that it writes."""
    batch = trained.batches("validation", limit=1)[0]
    row = int(batch.weights.sum(axis=1).argmax())
    length = int(batch.weights[row].sum())
    weights = trained.attention(batch, "decoder/layers", "cross_attention")[:, row, :, :length]
    written = [trained.tokenizer.token_text(i) for i in batch.targets[row, :length]]
    seconds = np.arange(weights.shape[-1]) / FRAMES_PER_SECOND
    title, axis = "When each word is heard", "time in the sound (s)"
    trained.save_figure(figures.head_grid(weights, written, title, seconds, axis), "attention")
