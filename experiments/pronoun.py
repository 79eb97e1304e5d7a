"""Pronoun resolution: a model of two layers learns what "it" refers to.

"The cat sat on the mat because it was tired" and "... because it was soft" differ in the last word
alone, and "it" refers to another noun. Word order cannot decide: the nearest noun is right half the
time, and so is the first. The first layer attends at most two tokens ahead, the second everywhere:
the first can bring "tired" to "it", the second can find "cat".

Claim: in sentences whose noun never occurs in training with this predicate, this verb or the other
  noun, at least 99% of the pronouns are resolved; and in at least 95% of these sentences the
  attention of "it", in the best head, is largest at the antecedent.
Source: Winograd schemas (Levesque et al. 2012); BERT's coreference heads (Clark et al. 2019, arXiv
  1906.04341).
Command: python run.py --config=pronoun
Time: 20 seconds on 2 CPU cores.
Result: 100% and 100% (three seeds).
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnlab.data import Data, Example, Tokenizer, Words
from attnlab.inspect.query_attention import query_attention
from attnlab.layers import AttentionConfig, Bidirectional
from attnlab.models import DecoderConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Experiment, Train

CATEGORIES = {  # six nouns, and four predicates that fit these nouns only
    "cat dog fox horse goat duck": "tired hungry sleepy afraid",
    "mat rug pillow blanket towel coat": "soft woven folded knitted",
    "apple cake loaf pear cheese egg": "ripe tasty stale rotten",
    "clock engine radio lamp pump car": "rusty noisy electric unplugged",
    "box bottle bucket basket jar barrel": "empty full sealed leaky",
    "tree rose fern bush lily vine": "blooming withered leafy thorny",
}
NOUNS = " ".join(CATEGORIES).split()
PREDICATES = [predicates.split() for predicates in CATEGORIES.values()]
VERBS = "sat stood lay slept rested waited".split()
PREPOSITIONS = "on under beside near".split()
ADJECTIVES = ["", "", "", "", "old ", "small ", "white ", "strange "]


class Sentence(NamedTuple):
    """A sentence and the noun that its "it" refers to."""

    text: str
    antecedent: str


def sentences(split: str) -> list[Sentence]:
    """Return the sentences of a split: "validation" has held-out pairs of words only, "train" none.

    A quarter of the antecedent's pairs with other nouns, verbs and predicates is held out.
    """
    rng, result = np.random.default_rng(0), []
    for noun, other, verb, predicate in itertools.product(range(36), range(36), range(6), range(4)):
        held_out = [(noun + n) % 4 == 0 for n in (other, verb, predicate)]
        in_split = all(held_out) if split == "validation" else not any(held_out)
        if noun // 6 == other // 6 or not in_split:
            continue
        for first, second in itertools.permutations((NOUNS[noun], NOUNS[other])):
            adjective, other_adjective = rng.choice(ADJECTIVES, 2)
            place = f"{VERBS[verb]} {rng.choice(PREPOSITIONS)} the {other_adjective}{second}"
            text = f"the {adjective}{first} {place} because it was {PREDICATES[noun // 6][predicate]}"
            result.append(Sentence(text, NOUNS[noun]))
    return result


@dataclass(frozen=True, kw_only=True)
class Pronouns(Data):
    """Sentences whose only target is at "it": the noun that it refers to."""

    tokenizer: Words = Words()  # noqa: RUF009 - frozen, so safe to share

    def records(self, split: str) -> list[Sentence]:
        """Return the sentences of a split; see `sentences`."""
        return sentences(split)

    def text(self, record: Sentence) -> str:
        """Return the words of the sentence."""
        return record.text

    def encode(self, record: Sentence, tokenizer: Tokenizer) -> Example:
        """Return the words as tokens, with the antecedent as the target at "it"."""
        at_it = np.array([word == "it" for word in record.text.split()])
        (answer,) = tokenizer.encode(record.antecedent)
        return Example(tokenizer.encode(record.text), at_it * answer, at_it * 1.0, at_it * 0)


def get_config() -> Experiment:
    """Return two layers of one head: the first attends two tokens ahead, the second everywhere."""
    ahead_then_all = (Bidirectional(left=0, right=2), Bidirectional())
    return Experiment(
        model=DecoderConfig(depth=2, width=64, attention=AttentionConfig(heads=1), pattern=ahead_then_all),
        data=Pronouns(sequence_length=64, batch_size=32),
        optimizer=AdamW(learning_rate=3e-3),
        train=Train(steps=400, eval_every=200, checkpoint_every=400, log_every=20),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report the resolved pronouns, how often the best head finds the antecedent, and a figure."""
    correct, on_antecedent = [], []
    for batch in trained.batches("validation"):
        row, it = np.nonzero(batch.weights)
        answers = batch.targets[row, it]
        correct.append(trained.predict(batch)[row, it] == answers)
        peak = trained.attention(batch)[:, row, :, it].argmax(-1)  # (sentences, layers, heads)
        on_antecedent.append(batch.tokens[row[:, None, None], peak] == answers[:, None, None])
    accuracy, heads = np.concatenate(correct).mean(), np.concatenate(on_antecedent).mean(axis=0)
    layer, head = np.unravel_index(heads.argmax(), heads.shape)
    trained.log(f"resolved: {accuracy:.1%} of unseen combinations; by the nearest or the first noun: 50.0%")
    trained.log(
        f'best head: layer {layer + 1}, head {head + 1}; its attention from "it" is largest at the '
        f"antecedent in {heads.max():.1%}"
    )
    pair = []
    for predicate, antecedent in (("tired", "cat"), ("soft", "mat")):
        words = f"the cat sat on the mat because it was {predicate}".split()
        weights = trained.attention_of_tokens(trained.tokenizer.encode(" ".join(words)))
        pair.append((words, words.index("it"), weights[:, :, words.index("it")], words.index(antecedent)))
    trained.save_figure(query_attention(pair, 'What "it" attends to'), "it")
    trained.claim("pronouns resolved", accuracy, ">=", 0.99)
    trained.claim("sentences where the best head peaks on the antecedent", heads.max(), ">=", 0.95)
    return {"accuracy": float(accuracy), "best_head": float(heads.max())}
