"""Characters told by their names: a Vision Transformer reads a picture, and a decoder looks at its patches.

"latin small letter h with descender" is made of words that belong to places of the picture. The characters of
the validation split were never shown, in any style; nor was their style, bold and slanted at once. Their
words were, in other names, and so were bold letters and slanted ones.

Claim: of the words of such names at least 70% are right, given those before; of the likeliest words after the
  last one, the picture unseen, less than 50%.
Source: Show, attend and tell (Xu et al., arXiv 1502.03044), its parts replaced by Transformers.
Command: python run.py --config=experiments/caption.py
  The same by Flamingo's gates and resampler, `caption.py:gates`, or with the patches read as tokens before
  the name, `caption.py:prefix`; the claim is not of these.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np

from attnlab.data.builtin.glyphs import Glyphs
from attnlab.errors import InputError
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, LayerNormConfig
from attnlab.layers.blocks import CrossAttentionConfig, GatedCrossAttentionConfig
from attnlab.layers.pooling import ClassToken
from attnlab.layers.resampler import ResamplerConfig
from attnlab.models import CaptionerConfig, DecoderConfig, Learned, PrefixConfig, ViTConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Muon, Train, WarmupStableDecay

SHOWN = "latin capital letter u with horn"


def get_config(kind: str = "branches") -> Experiment:
    """Four layers read 16 patches of 8 by 8 pixels, two write; `kind` is how they see those."""
    sizes = {"width": 96, "attention": AttentionConfig(heads=4, bias=True), "norm": LayerNormConfig()}
    pooling = ClassToken(dense=True)  # which no one reads, but a ViT in a checkpoint has
    encoder = ViTConfig(depth=4, image=(32, 32, 1), patch=(8, 8), pooling=pooling, classes=0, **sizes)
    decoder = DecoderConfig(depth=2, positions=Learned(32), **sizes)
    models = {
        "branches": CaptionerConfig(encoder, decoder),
        "gates": CaptionerConfig(
            encoder, decoder, resampler=ResamplerConfig(8, 1), cross=GatedCrossAttentionConfig()
        ),
        "prefix": PrefixConfig(encoder, decoder, ahead=True),
    }
    if kind not in models:
        raise InputError(f"caption.py:{kind} is unknown; it is one of {', '.join(models)}")
    return Experiment(
        model=models[kind],
        data=Glyphs(batch_size=64),
        optimizer=Muon(learning_rate=1e-2, schedule=WarmupStableDecay(warmup=20, decay=0.4)),
        train=Train(steps=1500, eval_every=300, checkpoint_every=1500),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Words and names that are right, beside a baseline that sees no picture, and where a word looks."""
    batches = trained.batches("validation")
    likeliest = _likeliest_next(trained)
    words, baseline, names = [], [], []
    for batch in batches:
        counted = (batch.weights > 0) & (batch.targets != trained.tokenizer.eos_id)
        words.append((trained.predict(batch) == batch.targets)[counted])
        baseline.append((likeliest[batch.tokens] == batch.targets)[counted])
        there = batch.segments.any(axis=1)
        told = trained.generator()(sources=list(batch.source[there]), max_new_tokens=batch.tokens.shape[1])
        wanted = [trained.tokenizer.decode(row) for row in batch.targets[there]]
        names.append([one.text == name for one, name in zip(told, wanted, strict=True)])
    right = {
        name: float(np.concatenate(found).mean())
        for name, found in {"words": words, "words_unseen": baseline, "names": names}.items()
    }
    trained.log(
        f"words of unseen characters' names: {right['words']:.1%} right, {right['words_unseen']:.1%} by the "
        f"word before alone; whole names: {right['names']:.1%}"
    )
    if isinstance(
        getattr(trained.experiment.model, "cross", None), CrossAttentionConfig
    ):  # else nothing is of one place
        _look(trained)
    trained.claim("words right, given those before", right["words"], ">=", 0.7)
    trained.claim("words right from the previous word alone", right["words_unseen"], "<", 0.5)
    return right


def _look(trained: TrainedModel) -> None:
    """Keeps a picture of where in the image each word of a name looks, as the heads of the last layer do."""
    for batch in trained.batches("validation"):
        names = [trained.tokenizer.decode(row) for row in batch.targets]
        if SHOWN not in names:
            continue
        row, words = names.index(SHOWN), SHOWN.split()
        weights = trained.attention(batch, "decoder/layers", "cross_attention")[-1, row].mean(0)
        encoder = trained.experiment.model.encoder
        grid = weights[: len(words), encoder.prefix :].reshape(len(words), *encoder.grid)
        figure = figures.image_overlay(batch.source[row, ..., 0], words, grid, "Where each word looks")
        trained.save_figure(figure, "looks")


def _likeliest_next(trained: TrainedModel) -> np.ndarray:
    """The word that comes most often after each in training, by the words' numbers."""
    data, follows = trained.experiment.data, defaultdict(Counter)
    for name in Counter(data.text(record) for record in data.records("train")):
        ids = [trained.tokenizer.eos_id, *trained.tokenizer.encode(name), trained.tokenizer.eos_id]
        for word, after in itertools.pairwise(ids):
            follows[word][after] += 1
    found = np.zeros(trained.tokenizer.vocab_size, np.int32)
    for word, after in follows.items():
        found[word] = after.most_common(1)[0][0]
    return found
