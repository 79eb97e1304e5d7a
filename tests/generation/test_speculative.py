"""Speculative decoding: the text is distributed as without it."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import BPE
from attnlab.generation import (
    DraftModel,
    Generator,
    PromptLookup,
    SamplingParams,
    filter_logits,
    prefill,
    row_keys,
)
from attnlab.generation.speculative import DraftSpeculator, accept_or_resample, init_speculation, speculate
from attnlab.layers import AttentionConfig
from attnlab.models import DecoderConfig, RecurrentConfig
from attnlab.sharding import make_mesh, parse_mesh
from tests.generation.models import WINDOWED, next_log_probs, start
from tests.generation.test_generate import GREEDY, generator

PROMPTS = ["abcabcab", "hello, hel", "x"]
SAMPLING = SamplingParams(0.8, top_k=20, top_p=0.9)
LIKELIEST = SamplingParams(0.0, top_k=20, top_p=0.9)  # by the same programs
SMALLER = DecoderConfig(depth=1, width=16, attention=AttentionConfig(heads=2), tied=False)
MESH = "data:2,fsdp:2,tensor:2"


@cache
def pair(text="single"):
    """A model with windows, and a smaller one."""
    mesh = make_mesh(parse_mesh(text, 8))
    return generator(mesh), generator(mesh, SMALLER)


@pytest.mark.parametrize(
    ("mesh", "kind"), [("single", "lookup"), (MESH, "lookup"), ("single", "draft"), (MESH, "draft")]
)
def test_the_likeliest_tokens_are_the_same(kind, mesh):
    one, other = pair(mesh)
    speculator = {"lookup": PromptLookup(2, 3), "draft": DraftModel(other, 3)}[kind]
    got = one(PROMPTS, max_new_tokens=23, sampling=LIKELIEST, speculator=speculator)
    assert got == one(PROMPTS, max_new_tokens=23, sampling=LIKELIEST)
    assert max(len(row.tokens) for row in got) == 23


def test_what_is_looked_up_changes_no_draw():
    """Of a guess that is certain the rejections come to drawing as ever."""
    one, _ = pair()
    options = {"max_new_tokens": 23, "sampling": SAMPLING, "seed": 3}
    pieces = {}
    got = one(
        PROMPTS,
        **options,
        speculator=PromptLookup(2, 3),
        stream=lambda i, text: pieces.setdefault(i, []).append(text),
    )
    assert got == one(PROMPTS, **options)
    assert ["".join(pieces[i]) for i in range(3)] == [row.text for row in got]
    assert one(["x"], max_new_tokens=0, speculator=PromptLookup())[0].tokens == []


def test_draws_of_a_row_do_not_depend_on_the_others():
    """Nor on how far other rows' guesses held."""
    one, other = pair()
    options = {"max_new_tokens": 23, "sampling": SAMPLING, "seed": 3, "speculator": DraftModel(other, 3)}
    first, second = one(PROMPTS, **options), one(["abcabcab", "zzz", "x"], **options)
    assert (first[0], first[2]) == (second[0], second[2]) and first[1] != second[1]
    assert first[0].tokens != one(PROMPTS, **options | {"seed": 4})[0].tokens


def chi_square(counts, expected):
    """How far counts are from expected ones, in deviations of what chance would do."""
    seen = expected > 0
    assert not counts[~seen].any()
    distance = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    return (distance - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(0.7, top_k=3), SamplingParams(1.5, top_p=0.6), GREEDY],
    ids=str,
)
def test_a_settled_token_is_distributed_as_the_model_has_it(sampling):
    rows = 40_000
    p, q = (jnp.tile(jax.random.normal(jax.random.key(i), (1, 5)), (rows, 1)) for i in (1, 2))
    keys = row_keys(jax.random.key(0), jnp.arange(rows))
    draft_tokens = jax.vmap(jax.random.categorical)(
        row_keys(jax.random.key(9), jnp.arange(rows)), filter_logits(q, sampling)
    )
    tokens, accepted = accept_or_resample(keys, draft_tokens, p, q, sampling)
    target, drafted = (np.asarray(jax.nn.softmax(filter_logits(x[:1], sampling)))[0] for x in (p, q))
    share = np.minimum(target, drafted).sum()  # that algorithm 1 accepts (section 3.3)
    assert abs(float(accepted.mean()) - share) < 5 * np.sqrt(max(share * (1 - share), 1e-9) / rows)
    counts = np.bincount(tokens, minlength=5)
    assert (
        chi_square(counts, rows * target) < 5
        if np.count_nonzero(target) > 1
        else counts.argmax() == target.argmax()
    )
    if share < 0.99:  # what the model drafted with is another distribution, and the test sees it
        assert abs(np.bincount(draft_tokens, minlength=5) - rows * target).max() > 0.01 * rows


def test_texts_are_distributed_as_the_model_has_them():
    """Of all texts of three tokens, drawn by many rows that go on in step."""
    rows, vocabulary, prompt = 2048, 4, [1, 3, 2]
    (model, params), (draft, theirs) = start(WINDOWED, vocabulary), start(SMALLER, vocabulary, 1)
    tokens = jnp.tile(jnp.array([prompt]), (rows, 1))
    decode_state, other = (
        prefill(m, 12, p, tokens, jnp.ones_like(tokens)) for m, p in ((model, params), (draft, theirs))
    )
    options = {"sampling": SamplingParams(), "eos_id": vocabulary}  # no token ends a text
    keys = row_keys(jax.random.key(0), jnp.arange(rows))
    state = init_speculation(decode_state, other.cache, keys, looks_up=False, **options)
    first = np.asarray(state.last)[:, None]
    _, more, number = speculate(
        model, params, DraftSpeculator(draft, 2), theirs, state, capacity=8, limit=2, **options
    )
    assert number >= 2
    texts = np.concatenate([first, np.asarray(more)[:, :2]], axis=1)
    all_texts = [*itertools.product(range(vocabulary), repeat=3)]
    log_probs = [
        next_log_probs(model, params, [[*prompt, *text[:n]] for text in all_texts])[np.arange(64), [t[n] for t in all_texts]]
        for n in range(3)
    ]  # fmt: skip
    expected = rows * np.exp(np.sum(log_probs, axis=0))
    counts = np.bincount(texts @ [16, 4, 1], minlength=64)
    assert chi_square(counts, expected) < 5
    assert chi_square(counts[::-1], expected) > 50


@pytest.mark.parametrize("kind", ["itself", "lookup"])
def test_fewer_passes_where_guesses_are_right(kind):
    model, params = start(WINDOWED, 9)
    tokens = jnp.array([[1, 3, 2]])
    decode_state = prefill(model, 60, params, tokens, jnp.ones_like(tokens))
    speculator, speculator_state = (
        DraftSpeculator(model, 3),
        prefill(model, 60, params, tokens, jnp.ones_like(tokens)).cache,
    )
    if kind == "lookup":
        speculator, speculator_state = PromptLookup(2, 3), jnp.full((1, 60), -1).at[:, :3].set(tokens)
    options = {"sampling": GREEDY, "eos_id": 9}
    keys = row_keys(jax.random.key(0), jnp.arange(1))
    state = init_speculation(decode_state, speculator_state, keys, looks_up=kind == "lookup", **options)
    state, tokens, number = speculate(
        model, params, speculator, params, state, capacity=44, limit=40, **options
    )
    if kind == "itself":
        assert (int(state.passes), int(number)) == (10, 40)
    else:  # the likeliest text soon repeats itself
        assert 10 <= int(state.passes) < 30
    assert int(state.cache.index) == 3 + int(number) == int(state.cache.segments.sum())
    assert len(set(tokens[0, :40].tolist())) > 2


def test_refusals(refuses):
    one, _ = pair()
    config = RecurrentConfig(depth=1, width=16)
    params = config.build(257).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    recurrent = Generator(config.build(257), params, one.tokenizer, 40, one.mesh)
    for model, speculator in ((recurrent, PromptLookup()), (one, DraftModel(recurrent))):
        with refuses("a recurrent model cannot rewind its state"):
            model(["x"], speculator=speculator)
    words = BPE(257).train(["a"])
    other = generator(one.mesh, SMALLER)
    other.tokenizer = words
    assert one.tokenizer.same_vocabulary(one.tokenizer) and not one.tokenizer.same_vocabulary(words)
    with refuses("the draft model must have the same vocabulary"):
        one(["x"], speculator=DraftModel(other))
    with refuses("PromptLookup.ngram is 0"):
        PromptLookup(0)
    with refuses("DraftModel.num_speculative_tokens is 0; it must be at least 1"):
        DraftModel(one, 0)
