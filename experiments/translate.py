"""Machine translation: numbers in words from English to German, by the original Transformer.

"twenty-three thousand, four hundred and fifty-six" is "dreiundzwanzigtausendvierhundertsechsund-
fünfzig": one word, with units before tens, so the alignment is not monotonic, and a translation is
either right or wrong. Whole thousands are held out of training: 3,000 to 3,999, 11,000 to 11,999
and so on.

Claim: at least 90% of the numbers of held-out thousands are translated without an error.
Source: Vaswani et al. 2017 (arXiv 1706.03762, sections 3, 5.3 and 5.4), made small.
Command: python run.py --config=translate
Time: 2.4 minutes on 2 CPU cores.
Result: 98.6% of 500 (one seed).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from num2words import num2words

from attnlab.data import BPE, Data, Example, Tokenizer
from attnlab.generation import SamplingParams
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig, Normal
from attnlab.models import DecoderConfig, EncoderConfig, Seq2SeqConfig, Sinusoidal
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Experiment, InverseSquareRoot, Loss, Train

COUNT = {"train": 20_000, "validation": 500}


@dataclass(frozen=True, kw_only=True)
class Numbers(Data):
    """Numbers below `limit` in two languages; every eighth thousand is for validation."""

    tokenizer: BPE = BPE(400)  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 32
    source_length: int = 32
    limit: int = 100_000

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Return the length of the English tokens, with their end token."""
        return (self.source_length,)

    def records(self, split: str) -> list[int]:
        """Return random numbers of the split's own thousands."""
        numbers = np.arange(self.limit)
        held_out = numbers // 1000 % 8 == 3
        own = numbers[held_out if split == "validation" else ~held_out]
        rng = np.random.default_rng(0)
        return rng.choice(own, min(COUNT[split], len(own)), replace=False).tolist()

    def text(self, record: int) -> str:
        """Return the number in both languages, for the tokenizer to train on."""
        return f"{num2words(record)}\n{german(record)}"

    def encode(self, record: int, tokenizer: Tokenizer) -> Example:
        """Return the German tokens as targets, with the English tokens as their source."""
        ids = [*tokenizer.prefix_tokens, *tokenizer.encode(german(record)), tokenizer.eos_id]
        targets, source = np.array(ids[1:]), np.array(tokenizer.encode_source(num2words(record)))
        return Example(
            np.array(ids[:-1]), targets, np.ones(len(targets)), tokenizer.token_bytes[targets], source
        )


def german(number: int) -> str:
    """Return the number in German words."""
    return num2words(number, lang="de")


def get_config() -> Experiment:
    """Return the paper's model, optimizer and loss, at two layers and a quarter of its width."""
    half: dict[str, Any] = {
        "depth": 2,
        "width": 128,
        "attention": AttentionConfig(heads=4, bias=True),
        "feed_forward": MLPConfig(512, "relu"),
        "norm": LayerNormConfig(),
        "placement": "post",
        "positions": Sinusoidal(halves=True),
        "scale_embedding": True,
        "dropout": 0.1,
        "init": Normal(128**-0.5),
    }
    return Experiment(
        model=Seq2SeqConfig(
            EncoderConfig(**half), DecoderConfig(readout_bias=True, **half), shared_embedding=True
        ),
        data=Numbers(batch_size=64),
        optimizer=AdamW(
            learning_rate=2e-3, schedule=InverseSquareRoot(200), weight_decay=0.0, b2=0.98, epsilon=1e-9
        ),
        loss=Loss(label_smoothing=0.1),
        train=Train(steps=1000, eval_every=500, checkpoint_every=1000, log_every=50),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report the unseen numbers translated without an error, and a figure of cross-attention."""
    numbers = trained.records("validation")
    outputs = trained.generate(
        [num2words(number) for number in numbers], sampling=SamplingParams(temperature=0.0), max_new_tokens=31
    )
    correct = np.array([row.text == german(number) for row, number in zip(outputs, numbers, strict=True)])
    for row, number in [*zip(outputs, numbers, strict=True)][:3]:
        trained.log(f"{number}: {row.source} -> {row.text}")
    trained.log(f"translated without an error: {correct.mean():.1%} of {len(correct)} unseen numbers")
    trained.claim("unseen numbers translated without an error", correct.mean(), ">=", 0.9)
    _save_attention(trained)
    return {"accuracy": float(correct.mean())}


def _save_attention(trained: TrainedModel) -> None:
    """Save the attention of one translation's tokens over the English words."""
    batch = trained.batches("validation", limit=1)[0]
    row = int(np.argmin(abs(batch.segments.sum(axis=1) - 10)))
    target_length, source_length = int(batch.segments[row].sum()), int(batch.source_segments[row].sum())
    maps = trained.attention(batch, stack="decoder/layers", branch="cross_attention")
    targets, source = (
        [trained.tokenizer.token_text(i) for i in ids]
        for ids in (batch.targets[row, :target_length], batch.source[row, :source_length])
    )
    weights = maps[:, row, :, :target_length, :source_length]
    figure = figures.head_grid(weights, targets, "Attention of each translated token", source)
    trained.save_figure(figure, "cross_attention")
