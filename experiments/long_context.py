"""Context windows: a model finds one capital letter anywhere in a long row of small letters.

The answer to the question mark at the end of a row is the capital letter in it. Full attention
scores every pair of positions, so the distance does not matter. Layers with a window see a fixed
number of earlier tokens: depth x (window - 1) in all, however long the row is.

The memory of activations grows with the length. A mesh with an axis `sequence` divides it:
`--config.data.sequence_length=131072 --mesh=sequence:64`.

Claim: full attention names at least 95% of the capitals in the first half of a row. With windows of
  16 tokens in two layers, the model names 95% of those at most 15 tokens before the end, but fewer
  than 25% of those in the first half, where guessing names 12.5%.
Source: needle-in-a-haystack tests (Kamradt 2023); the reach of windows: Mistral 7B (arXiv
  2310.06825, section 2).
Command: python run.py --config=long_context
Time: 55 seconds of CPU time for each of the two.
Result: 100% and 100% with full attention; 100% and 15.2% with windows; one seed.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.data import Bytes, Data, Example, Tokenizer
from attnlab.layers import AttentionConfig, Causal, Sliding
from attnlab.models import DecoderConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Experiment, Train

NEEDLES = "ABCDEFGH"
HAY = "abcdefghijklmnopqrstuvwxyz"
WINDOW = 16
LAYERS = {"full": Causal(), "window": Sliding(window=WINDOW)}
ROWS = {"train": range(100_000), "validation": range(100_000, 100_512)}


@dataclass(frozen=True, kw_only=True)
class Haystack(Data):
    """Rows of small letters with one capital, which is the only target, at the end of the row.

    In half of the rows the capital is anywhere, in the others at most 15 tokens before the end.
    """

    tokenizer: Bytes = Bytes()  # noqa: RUF009 - frozen, so safe to share

    def records(self, split: str) -> range:
        """Return the seeds of the rows."""
        return ROWS[split]

    def text(self, record: int) -> str:
        """Return the row of this seed."""
        rng = np.random.default_rng(record)
        letters = rng.choice(list(HAY), self.sequence_length)
        places = self.sequence_length - 1 if rng.random() < 0.5 else WINDOW - 1
        letters[-2 - rng.integers(places)] = rng.choice(list(NEEDLES))
        letters[-1] = "?"
        return "".join(letters)

    def encode(self, record: int, tokenizer: Tokenizer) -> Example:
        """Return the row as tokens, with the capital as the target of the last one."""
        text = self.text(record)
        (answer,) = tokenizer.encode(next(letter for letter in text if letter in NEEDLES))
        is_last = np.arange(len(text)) == len(text) - 1
        return Example(tokenizer.encode(text), is_last * answer, is_last * 1.0, is_last * 0)


def get_config(layers: str = "full") -> Experiment:
    """Return two layers with full attention, or with windows: `long_context.py:window`."""
    attention = AttentionConfig(heads=4)
    return Experiment(
        model=DecoderConfig(depth=2, width=64, attention=attention, pattern=(LAYERS[layers],)),
        data=Haystack(sequence_length=256, batch_size=16),
        optimizer=AdamW(learning_rate=3e-3),
        train=Train(steps=300, eval_every=100, checkpoint_every=300, log_every=20),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report how many capitals of the first half of a row are named, and of the last tokens."""
    correct, distance = [], []
    capitals = trained.tokenizer.encode(NEEDLES)
    for batch in trained.batches("validation"):
        valid = batch.weights[:, -1] > 0
        correct.append((trained.predict(batch) == batch.targets)[valid, -1])
        place = np.isin(batch.tokens, capitals).argmax(axis=1)
        distance.append((batch.tokens.shape[1] - 1 - place)[valid])
    hits, away = np.concatenate(correct), np.concatenate(distance)
    near, far = (float(hits[part].mean()) for part in (away < WINDOW, away >= batch.tokens.shape[1] // 2))
    trained.log(f"capitals named: {near:.1%} at most 15 tokens before the end, {far:.1%} in the first half")
    trained.claim("capitals named at most 15 tokens before the end", near, ">=", 0.95)
    if isinstance(trained.experiment.model.pattern[0], Sliding):
        trained.claim("capitals of the first half named through windows", far, "<", 0.25)
    else:
        trained.claim("capitals of the first half named", far, ">=", 0.95)
    return {"near": near, "far": far}
