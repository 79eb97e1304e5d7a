"""Language models whose layers differ in one score, normalizer or mixer: `zoo.py:VARIANT`.

Claim: each variant needs fewer than 3.25 bits per byte of documentation of unseen modules; a model
  that sees only the previous byte needs more.
Source: the paper of each variant; see `attnlab/layers/scores.py`, `normalizers.py` and `mixers.py`.
Command: python run.py --config=zoo.py:alibi
Time: 70 seconds of CPU time.
Result: one seed: 2.40 for cope, 2.41 for fox, 2.43 for selective, 2.49 for shaw, 2.51 for entmax,
  2.52 for talking_heads, 2.54 for sparsemax, 2.58 for value_residual, 2.59 for temperature, 2.61
  for softmax, softcap and top_k, 2.63 for differential, 2.64 for softmax_one, 2.65 for alibi and
  gated_output, 2.71 for latent, 2.79 for t5, 2.81 for sigmoid; 3.28 from the previous byte.
"""

import numpy as np

from attnlab.data import Bytes, Text
from attnlab.errors import InputError
from attnlab.layers import (
    AttentionConfig,
    Causal,
    GatedMLPConfig,
    LayerSpec,
    NoPositions,
    mixers,
    normalizers,
    scores,
)
from attnlab.models import DecoderConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Muon, Train, WarmupStableDecay


def _instead_of_rotary(score: scores.LayerScore) -> LayerSpec:
    """Return a layer whose order of tokens comes from the score."""
    return Causal(positions=NoPositions(), score=score)


VARIANTS: dict[str, LayerSpec] = {
    "softmax": Causal(),
    "alibi": _instead_of_rotary(scores.ALiBi()),
    "t5": _instead_of_rotary(scores.T5Bias()),
    "shaw": _instead_of_rotary(scores.Shaw()),
    "cope": _instead_of_rotary(scores.CoPE()),
    "fox": _instead_of_rotary(scores.FoX()),
    "temperature": Causal(score=scores.Temperature(length=128)),
    "softcap": Causal(score=scores.Softcap(cap=20.0)),
    "selective": Causal(score=scores.Selective()),
    "softmax_one": Causal(normalizer=normalizers.SoftmaxOne()),
    "sigmoid": Causal(normalizer=normalizers.Sigmoid(length=128)),
    "top_k": Causal(normalizer=normalizers.TopK(k=16)),
    "sparsemax": Causal(normalizer=normalizers.Sparsemax()),
    "entmax": Causal(normalizer=normalizers.Entmax()),
    "talking_heads": Causal(mixer=mixers.TalkingHeads()),
    "gated_output": Causal(mixer=mixers.GatedOutput()),
    "value_residual": Causal(mixer=mixers.ValueResidual()),
    "differential": Causal(mixer=mixers.Differential()),
    "latent": Causal(mixer=mixers.LatentAttention(rank=16, rotary_dim=8)),
}


def get_config(variant: str = "alibi") -> Experiment:
    """Return two layers of this variant.

    Raises:
      InputError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise InputError(f"zoo.py has no variant {variant!r}. Variants: {', '.join(VARIANTS)}")
    return Experiment(
        model=DecoderConfig(
            depth=2,
            width=64,
            attention=AttentionConfig(heads=4),
            feed_forward=GatedMLPConfig(),
            pattern=(VARIANTS[variant],),
        ),
        data=Text(name="stdlib_docs", tokenizer=Bytes(), sequence_length=128, batch_size=16),
        optimizer=Muon(learning_rate=1e-2, schedule=WarmupStableDecay(warmup=10, decay=0.4)),
        train=Train(steps=240, eval_every=240, eval_batches=8, checkpoint_every=240),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report bits per byte beside the entropy of a byte given the previous one."""
    pairs = np.zeros((256, 256))
    for batch in trained.batches("validation", limit=8):
        first, second = batch.tokens[:, :-1], batch.tokens[:, 1:]
        valid = (first < 256) & (second < 256) & (batch.segments[:, 1:] > 0)
        np.add.at(pairs, (first[valid], second[valid]), 1)
    share, of_first = pairs / pairs.sum(), pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    entropy = -float(np.sum(share[pairs > 0] * np.log2(of_first[pairs > 0])))
    model = trained.metrics["bits_per_byte"]
    trained.log(f"bits per byte: {model:.2f}; entropy given the previous byte {entropy:.2f}")
    trained.claim("bits per byte", model, "<", 3.25)
    trained.claim("bits per byte from the previous byte", entropy, ">", 3.25)
    return {"bits_per_byte": model, "entropy_given_previous_byte": entropy}
