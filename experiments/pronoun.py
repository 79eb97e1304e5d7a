"""What does "it" mean? The sentence that explains attention, learned by a model of two layers.

"The cat sat on the mat because it was tired" and "... because it was soft" differ in one word, at the end, and "it"
means another thing. Word order cannot tell: over all sentences the nearest noun is right half the time, and so is the first.

Claim: on sentences whose noun was never seen with its predicate, nor with its verb, nor with the other noun, at least
  99% of pronouns are resolved, and in at least 95% one head's "it" looks at the antecedent most of all words.
Source: Winograd schemas (Levesque et al. 2012); attention to antecedents in BERT (Clark et al. 2019, arXiv 1906.04341, section 4.2).
Command: python run.py --config=experiments/pronoun.py
"""

import itertools
from dataclasses import dataclass

import numpy as np

from attnlab.data import Data, Example, Tokenizer, Words
from attnlab.inspect import pictures
from attnlab.layers import Attention, Bidirectional
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Cosine, Experiment, Train
from attnlab.trained import Trained

ANIMALS = "cat dog fox owl mouse horse rabbit goat bear duck frog lion".split()
OBJECTS = "mat box chair rug bench cart shelf pillow table boat basket blanket".split()
VERBS = "sat stood lay slept rested waited".split()
PREPOSITIONS = "on under beside near".split()
ADJECTIVES = "old small white strange".split()
OF_ANIMALS = "tired hungry sleepy thirsty afraid bored happy sick".split()
OF_OBJECTS = "soft wooden dusty broken torn cheap empty wet".split()


@dataclass(frozen=True)
class Sentence:
    """A sentence and the noun that its "it" means."""

    text: str
    antecedent: str


def _held_out(antecedent: int, other: int, verb: int, predicate: int) -> list[bool]:
    """Which pairs of this combination are kept from training: each a fixed quarter of all such pairs."""
    return [(antecedent + n) % 4 == 0 for n in (other, verb, predicate)]


def sentences(split: str, seed: int = 0) -> list[Sentence]:
    """Every combination with no held-out pair, for training, or with nothing but such pairs, for validation."""
    rng = np.random.default_rng(seed)
    found = []
    combinations = itertools.product(range(12), range(12), range(6), range(8), (True, False), (True, False))
    for noun, other, verb, predicate, of_animal, noun_first in combinations:
        held_out = _held_out(noun, other, verb, predicate)
        if not (all(held_out) if split == "validation" else not any(held_out)):
            continue
        nouns, others = (ANIMALS, OBJECTS) if of_animal else (OBJECTS, ANIMALS)
        first, second = (nouns[noun], others[other]) if noun_first else (others[other], nouns[noun])
        quality = (OF_ANIMALS if of_animal else OF_OBJECTS)[predicate]
        adjectives = [f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.3 else "" for _ in range(2)]
        text = (
            f"the {adjectives[0]}{first} {VERBS[verb]} {rng.choice(PREPOSITIONS)} "
            f"the {adjectives[1]}{second} because it was {quality}"
        )
        found.append(Sentence(text, nouns[noun]))
    return found


@dataclass(frozen=True, kw_only=True)
class Pronouns(Data):
    """Sentences in which the model must say, at "it", which noun it means."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share

    def records(self, split: str) -> list[Sentence]:
        """See `sentences`."""
        return sentences(split)

    def text(self, record: Sentence) -> str:
        """The words alone."""
        return record.text

    def encode(self, record: Sentence, tokenizer: Tokenizer) -> Example:
        """The words, with a target only at "it"."""
        words = record.text.split()
        here = np.array([word == "it" for word in words])
        (answer,) = tokenizer.encode(record.antecedent)
        return Example(tokenizer.encode(record.text), here * answer, here * 1.0, here * 0)


def get_config() -> Experiment:
    """Two layers of four heads that read whole sentences."""
    return Experiment(
        model=DecoderConfig(depth=2, width=64, attention=Attention(heads=4), pattern=(Bidirectional(),)),
        data=Pronouns(sequence_length=64, batch_size=32),
        optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=50), weight_decay=0.1),
        train=Train(steps=600, eval_every=200, checkpoint_every=600, log_every=20),
    )


def report(trained: Trained) -> dict[str, float]:
    """The share of pronouns resolved, and of those whose antecedent is where the best head looks; a picture of both twins."""
    right, looks_right = [], []
    for batch in trained.batches("validation"):
        row, at = np.nonzero(batch.weights)  # every "it"
        right.append(trained.predict(batch)[row, at] == batch.targets[row, at])
        looked_at = trained.attention(batch)[:, row, :, at].argmax(-1)  # ("it"s, layers, heads)
        looks_right.append(
            batch.tokens[row[:, None, None], looked_at] == batch.targets[row, at][:, None, None]
        )
    accuracy, heads = np.concatenate(right).mean(), np.concatenate(looks_right).mean(axis=0)
    layer, head = np.unravel_index(heads.argmax(), heads.shape)
    trained.say(f"resolved: {accuracy:.1%} of unseen combinations (nearest noun and first noun: 50.0%)")
    trained.say(f"best head: layer {layer + 1} head {head + 1} looks at the antecedent in {heads.max():.1%}")
    twins = []
    for predicate, antecedent in (("tired", "cat"), ("soft", "mat")):
        words = f"the cat sat on the mat because it was {predicate}".split()
        weights = trained.attention_of(trained.tokenizer.encode(" ".join(words)))
        twins.append((words, words.index("it"), weights[:, :, words.index("it")], words.index(antecedent)))
    trained.keep(pictures.looks(twins, 'Where "it" looks'), "it")
    trained.claim("99% of pronouns resolved", accuracy >= 0.99)
    trained.claim("one head on the antecedent in 95%", heads.max() >= 0.95)
    return {"accuracy": float(accuracy), "best_head": float(heads.max())}
