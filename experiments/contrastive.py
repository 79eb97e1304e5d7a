"""Characters and their names, each made a vector: near if they belong together, as in CLIP.

The characters of the validation split were never shown, in any style, nor was their style, bold and slanted
at once; nor were their names read, but their words were, in others. Each name is to find its character among
all of the split's, and each character its name.

Claim: of the unseen names at least 30% find their own character first, and at least 70% among the first ten,
  where chance is under 0.5% and under 5%; and characters find their names as often.
Source: CLIP (Radford et al., arXiv 2103.00020, section 2.3).
Command: python run.py --config=experiments/contrastive.py
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlab.data import Example, Tokenizer
from attnlab.data.builtin.glyphs import Glyphs
from attnlab.inspect import figures
from attnlab.layers import AttentionConfig, Normal
from attnlab.models import ContrastiveConfig, ViTConfig
from attnlab.models.contrastive import EndOfText, TextTowerConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Muon, Train, WarmupStableDecay

GRID = 8  # patches to a side
END = 0  # the number of the token that ends a name


@dataclass(frozen=True, kw_only=True)
class NamedGlyphs(Glyphs):
    """Pairs of a picture and a name: a row counts once, at its first token."""

    def encode(self, record: Any, tokenizer: Tokenizer) -> Example:
        """The name up to its end, and the picture; no token is predicted."""
        example = super().encode(record, tokenizer)
        once = np.arange(len(example.tokens)) == 0
        return example._replace(tokens=example.targets, weights=once * 1.0, num_bytes=once * 0)


def get_config() -> Experiment:
    """Three layers read 64 patches of 4 by 4 pixels, two the words of a name."""
    sizes = {"width": 96, "attention": AttentionConfig(heads=4, bias=True), "init": Normal(std=0.1)}
    return Experiment(
        model=ContrastiveConfig(
            image=ViTConfig(
                depth=3,
                image=(32, 32, 1),
                patch=(4, 4),
                patch_bias=False,
                embedding_norm=True,
                classes=0,
                **sizes,
            ),
            text=TextTowerConfig(depth=2, pooling=EndOfText(END), **sizes),
            width=64,
        ),
        data=NamedGlyphs(batch_size=64),
        optimizer=Muon(learning_rate=1e-2, schedule=WarmupStableDecay(warmup=20, decay=0.4)),
        train=Train(steps=600, eval_every=200, checkpoint_every=600, log_every=20),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """How often a name finds its character and the other way round, and where a picture is looked at."""
    batches = trained.batches("validation")
    there = [batch.segments.any(axis=1) for batch in batches]
    both = zip(*(trained.apply(batch, "hidden") for batch in batches), strict=True)
    images, texts = (np.concatenate([x[t] for x, t in zip(v, there, strict=True)]) for v in both)
    found, count = {}, len(images)
    for name, likeness in (("character", texts @ images.T), ("name", images @ texts.T)):
        before = (likeness > np.diag(likeness)[:, None]).sum(axis=1)  # how many are nearer than its own
        found |= {f"{name}_first": float((before < 1).mean()), f"{name}_in_ten": float((before < 10).mean())}
        trained.log(
            f"its own {name} first: {found[f'{name}_first']:.1%} of {count}, by chance {1 / count:.1%}; "
            f"among ten: {found[f'{name}_in_ten']:.1%}, by chance {10 / count:.1%}"
        )
    looks = trained.attention(batches[0], "image/layers")[-1, 0, :, 0, 1:].reshape(-1, GRID, GRID)
    heads = [f"head {i + 1}" for i in range(len(looks))]  # of the class token
    trained.save_figure(
        figures.image_overlay(batches[0].source[0, ..., 0], heads, looks, "Where it looks"), "looks"
    )
    trained.claim("names that rank their own character first", found["character_first"], ">=", 0.3)
    trained.claim("names with their own character in the top ten", found["character_in_ten"], ">=", 0.7)
    trained.claim("characters that rank their own name first", found["name_first"], ">=", 0.3)
    trained.claim("characters with their own name in the top ten", found["name_in_ten"], ">=", 0.7)
    trained.claim("first by chance", 1 / count, "<", 0.005)
    trained.claim("in the top ten by chance", 10 / count, "<", 0.05)
    return found
