"""Masked language modelling: an encoder restores hidden tokens of the Python documentation.

Of a text's tokens 15% are to be restored: 80% of these are replaced by the mask token (the one that
ends texts, which never occurs inside them), 10% by a random token, 10% stay. A hash of the text
seeds the choice, so it is the same in every epoch.

Claim: after 300 steps, a small encoder restores more than 18% of these tokens in documentation of
  modules outside the training split, and more than 3 times as many as the most frequent token does.
Source: BERT (Devlin et al. 2018, arXiv 1810.04805, section 3.1, task 1), with the layers of
  ModernBERT (Warner et al. 2024, arXiv 2412.13663, section 2.1), made small.
Command: python run.py --config=masked_lm
Time: 52 seconds on 2 CPU cores.
Result: 22.4%; the most frequent token 4.5% (one seed).
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.data import BPE, Example, Text, Tokenizer
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, Bidirectional, GatedMLPConfig, LayerNormConfig
from attnlab.models import EncoderConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Muon, Train, WarmupStableDecay

CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1  # fractions of all tokens, of the chosen, of the chosen


@dataclass(frozen=True, kw_only=True)
class MaskedText(Text):
    """Text with masked tokens as the only targets."""

    def encode(self, record: Any, tokenizer: Tokenizer) -> Example:
        """Return the corrupted tokens; the chosen tokens alone have weight."""
        text = self.text(record)
        tokens = tokenizer.encode(text)
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        chosen, action = rng.random((2, len(tokens)))
        chosen = chosen < CHOSEN
        random = rng.integers(tokenizer.vocab_size, size=len(tokens))
        corrupted = np.where(chosen & (action < MASKED), tokenizer.mask_id, tokens)
        corrupted = np.where(chosen & (action >= 1 - REPLACED), random, corrupted)
        return Example(corrupted, tokens, chosen.astype(np.float32), tokenizer.token_bytes[tokens])


def get_config() -> Experiment:
    """Return four layers; every other one attends to at most 16 tokens on either side."""
    return Experiment(
        model=EncoderConfig(
            depth=4,
            width=128,
            attention=AttentionConfig(heads=4),
            feed_forward=GatedMLPConfig(activation="gelu"),
            norm=LayerNormConfig(bias=False),
            pattern=(Bidirectional(left=16, right=16), Bidirectional()),
            embedding_norm=True,
            skip_first_attention_norm=True,
        ),
        data=MaskedText(tokenizer=BPE(vocab_size=512), sequence_length=128, batch_size=16),
        optimizer=Muon(learning_rate=5e-3, schedule=WarmupStableDecay(warmup=20, decay=0.4)),
        train=Train(steps=300, eval_every=300, checkpoint_every=150),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report the accuracy, that of the most frequent token, and a sentence with its attention."""
    targets = [batch.targets[batch.weights > 0] for batch in trained.batches("validation")]
    most_frequent = np.bincount(np.concatenate(targets)).max() / sum(map(len, targets))
    accuracy = trained.metrics["accuracy"]
    trained.log(f"masked tokens restored: {accuracy:.1%}; by the most frequent token: {most_frequent:.1%}")
    tokens = trained.tokenizer.encode("Return a list of the names in the file, or None if it is empty.")
    masked = tokens.copy()
    masked[3::6] = trained.tokenizer.mask_id
    predicted = trained.predict(trained.batch_from_tokens(masked))[0, : len(masked)]
    words = [trained.tokenizer.token_text(i) for i in masked]
    for i in range(3, len(tokens), 6):
        words[i] = f"[{trained.tokenizer.token_text(predicted[i])}]"
    trained.log("masked tokens restored in brackets: " + "".join(words))
    maps = trained.attention_of_tokens(masked.tolist())
    trained.save_figure(figures.head_grid(maps, words, "Attention of each token"), "attention")
    trained.claim("masked tokens restored", accuracy, ">", 0.18)
    trained.claim(
        "masked tokens restored, against 3 times the most frequent token", accuracy, ">", 3 * most_frequent
    )
    return {"accuracy": float(accuracy), "most_frequent": float(most_frequent)}
