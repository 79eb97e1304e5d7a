"""Numbers in words, from English to German, by the Transformer of 2017.

"twenty-three thousand, four hundred and fifty-six" is "dreiundzwanzigtausendvierhundertsechsundfünfzig": one
word, in which units come before tens, so that what is looked at changes its order; and an answer is right or
wrong. Whole thousands are held out: of 3,000 to 3,999, of 11,000 to 11,999 and so on nothing is ever seen.

Claim: at least 90% of the numbers of thousands that it never saw are translated without a fault.
Source: Vaswani et al. 2017, arXiv 1706.03762: sections 3 and 5.3 and 5.4, smaller.
Command: python run.py --config=translate
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
    """Numbers under `limit` in two languages; every eighth thousand is for validation."""

    tokenizer: BPE = BPE(400)  # noqa: RUF009 - frozen, so safe to share
    sequence_length: int = 32
    source_length: int = 32
    limit: int = 100_000

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The English words, with their end."""
        return (self.source_length,)

    def records(self, split: str) -> list[int]:
        """Random numbers of the split's own thousands."""
        numbers = np.arange(self.limit)
        held_out = numbers // 1000 % 8 == 3
        own = numbers[held_out if split == "validation" else ~held_out]
        rng = np.random.default_rng(0)
        return rng.choice(own, min(COUNT[split], len(own)), replace=False).tolist()

    def text(self, record: int) -> str:
        """Both languages, for the tokenizer to learn from."""
        return f"{num2words(record)}\n{german(record)}"

    def encode(self, record: int, tokenizer: Tokenizer) -> Example:
        """German, of English."""
        ids = [*tokenizer.prefix_tokens, *tokenizer.encode(german(record)), tokenizer.eos_id]
        targets, source = np.array(ids[1:]), np.array(tokenizer.encode_source(num2words(record)))
        return Example(
            np.array(ids[:-1]), targets, np.ones(len(targets)), tokenizer.token_bytes[targets], source
        )


def german(number: int) -> str:
    """The number in German words."""
    return num2words(number, lang="de")


def get_config() -> Experiment:
    """The paper's model, of two layers and a quarter of its width; its optimizer and its loss."""
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
        model=Seq2SeqConfig(EncoderConfig(**half), DecoderConfig(readout_bias=True, **half), shared=True),
        data=Numbers(batch_size=64),
        optimizer=AdamW(
            learning_rate=2e-3, schedule=InverseSquareRoot(200), weight_decay=0.0, b2=0.98, epsilon=1e-9
        ),
        loss=Loss(label_smoothing=0.1),
        train=Train(steps=1000, eval_every=500, checkpoint_every=1000, log_every=50),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """How many unseen numbers are translated without a fault, and where the words of one come from."""
    numbers = trained.experiment.data.records("validation")
    found = trained.generate(
        [num2words(number) for number in numbers], sampling=SamplingParams(temperature=0.0), max_new_tokens=31
    )
    right = np.array([row.text == german(number) for row, number in zip(found, numbers, strict=True)])
    for row, number in [*zip(found, numbers, strict=True)][:3]:
        trained.log(f"{number}: {row.source} -> {row.text}")
    trained.log(f"translated without a fault: {right.mean():.1%} of {len(right)} numbers of unseen thousands")
    trained.claim("numbers translated exactly", right.mean(), ">=", 0.9)
    _picture(trained)
    return {"accuracy": float(right.mean())}


def _picture(trained: TrainedModel) -> None:
    """Where each piece of one translation looks in the English words."""
    batch = trained.batches("validation", limit=1)[0]
    row = int(np.argmin(abs(batch.segments.sum(axis=1) - 10)))
    written, read = int(batch.segments[row].sum()), int(batch.source_segments[row].sum())
    maps = trained.attention(batch, stack="decoder/layers", branch="cross_attention")
    targets, source = (
        [trained.tokenizer.token_text(i) for i in ids]
        for ids in (batch.targets[row, :written], batch.source[row, :read])
    )
    shown = maps[:, row, :, :written, :read]
    trained.save_figure(
        figures.head_grid(shown, targets, "Where each piece comes from", source), "cross_attention"
    )
