"""Why attention was invented: sentences of an invented language, translated by a recurrent encoder-decoder.

Every word has one translation, and the words of each pair change places. No word comes twice in a sentence.

Claim: with attention (Bahdanau's) at least 95% of unseen sentences of 16 to 20 words are translated without a
  fault; without it, with the same states of the same width, fewer than 20%.
Source: Bahdanau et al. 2015, arXiv 1409.0473, figure 2, whose scores without attention fall with length.
Command: python run.py --config=recurrent_translate
  and python run.py --config=recurrent_translate --config.model.attention=NoAttention
"""

from dataclasses import dataclass

import numpy as np

from attnlab.data import Data, Example, Tokenizer, Words
from attnlab.inspect import figures
from attnlab.layers import GRUConfig, NoAttention
from attnlab.models import RecurrentSeq2SeqConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Experiment, Train

WORDS = [a + b + c for a in "bdgk" for b in "aeio" for c in "lmrs"]
MEANING = dict(zip(WORDS, np.random.default_rng(0).permutation(WORDS), strict=True))
LONGEST, COUNT = 20, {"train": 20_000, "validation": 640}


def translation(sentence: list[str]) -> list[str]:
    """What the words mean, the two of each pair in the other order."""
    order = [i ^ 1 if i ^ 1 < len(sentence) else i for i in range(len(sentence))]
    return [str(MEANING[sentence[i]]) for i in order]


@dataclass(frozen=True, kw_only=True)
class Sentences(Data):
    """Sentences of 1 to 20 words and their translations."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = LONGEST + 1

    @property
    def source_shape(self) -> tuple[int, ...]:
        """A sentence with its end."""
        return (LONGEST + 1,)

    def records(self, split: str) -> list[list[str]]:
        """Random sentences; one that comes in both splits is as good as impossible but for the shortest."""
        rng = np.random.default_rng(split == "train")
        lengths = rng.integers(1, LONGEST + 1, COUNT[split])
        return [[str(word) for word in rng.permutation(WORDS)[:length]] for length in lengths]

    def text(self, record: list[str]) -> str:
        """The words alone."""
        return " ".join(record)

    def encode(self, record: list[str], tokenizer: Tokenizer) -> Example:
        """The translation, beside the sentence."""
        example = super().encode(translation(record), tokenizer)
        return example._replace(source=np.append(tokenizer.encode(self.text(record)), tokenizer.eos_id))


def get_config() -> Experiment:
    """One layer each; the encoder reads both ways."""
    return Experiment(
        model=RecurrentSeq2SeqConfig(depth=1, width=128, cell=GRUConfig()),
        data=Sentences(batch_size=64),
        optimizer=AdamW(learning_rate=4e-3, weight_decay=0.0),
        train=Train(steps=1200, eval_every=600, checkpoint_every=1200, log_every=50),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Sentences without a fault by their length, and where the words of one look."""
    right, lengths = [], []
    for batch in trained.batches("validation"):
        faults = (trained.predict(batch) != batch.targets) & (batch.weights > 0)
        right.append(~faults.any(axis=1))
        lengths.append(batch.source_segments.sum(axis=1) - 1)
    right, lengths = np.concatenate(right), np.concatenate(lengths)
    found = {}
    for first in range(0, LONGEST, 5):
        these = (lengths > first) & (lengths <= first + 5)
        found[f"{first + 1}_to_{first + 5}"] = float(right[these].mean())
    told = ", ".join(f"of {name.replace('_', ' ')} words {share:.1%}" for name, share in found.items())
    trained.log(f"sentences without a fault: {told}")
    longest = found["16_to_20"]
    if isinstance(trained.experiment.model.attention, NoAttention):
        trained.claim("sentences of 16 to 20 words right without attention", longest, "<", 0.2)
        return found
    trained.claim("sentences of 16 to 20 words right with attention", longest, ">=", 0.95)
    _picture(trained)
    return found


def _picture(trained: TrainedModel) -> None:
    """Where the words of a translation come from, those of every pair crosswise."""
    batch = trained.batches("validation", limit=1)[0]
    row = int(np.argmin(abs(batch.source_segments.sum(axis=1) - 11)))
    length = int(batch.source_segments[row].sum())
    weights = trained.attention(batch, stack="decoder")[:, row, :, :length, :length]
    written, read = (
        [trained.tokenizer.token_text(i) for i in ids[row, :length]] for ids in (batch.targets, batch.source)
    )
    trained.save_figure(figures.head_grid(weights, written, "Where each word comes from", read), "alignment")
