"""Speculative decoding preserves the distribution of the generated text."""

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
from tests.selection import long

PROMPTS = ["abcabcab", "hello, hel", "x"]
SAMPLING = SamplingParams(0.8, top_k=20, top_p=0.9)
GREEDY_FILTERED = SamplingParams(0.0, top_k=20, top_p=0.9)  # greedy, with the programs of SAMPLING
SMALLER = DecoderConfig(depth=1, width=16, attention=AttentionConfig(heads=2), tied=False)
MESH = "data:2,fsdp:2,tensor:2"


@cache
def target_and_draft(text="single"):
    """Return the generators of a target model with sliding windows and a smaller draft model."""
    mesh = make_mesh(parse_mesh(text, 8))
    return generator(mesh), generator(mesh, SMALLER)


@pytest.mark.parametrize(
    ("mesh", "kind"), [long("single", "lookup"), (MESH, "lookup"), ("single", "draft"), long(MESH, "draft")]
)
def test_greedy_tokens_equal_plain_decoding(kind, mesh):
    target_model, draft_model = target_and_draft(mesh)
    speculator = {"lookup": PromptLookup(2, 3), "draft": DraftModel(draft_model, 3)}[kind]
    got = target_model(PROMPTS, max_new_tokens=23, sampling=GREEDY_FILTERED, speculator=speculator)
    assert got == target_model(PROMPTS, max_new_tokens=23, sampling=GREEDY_FILTERED)
    assert max(len(row.tokens) for row in got) == 23


def test_prompt_lookup_does_not_change_samples():
    """With a deterministic draft, acceptance reduces to comparing it with the usual sample."""
    target_model, _ = target_and_draft()
    options = {"max_new_tokens": 23, "sampling": SAMPLING, "seed": 3}
    pieces = {}
    got = target_model(
        PROMPTS,
        **options,
        speculator=PromptLookup(2, 3),
        stream=lambda i, text: pieces.setdefault(i, []).append(text),
    )
    assert got == target_model(PROMPTS, **options)
    assert ["".join(pieces[i]) for i in range(3)] == [row.text for row in got]
    assert target_model(["x"], max_new_tokens=0, speculator=PromptLookup())[0].tokens == []


def test_samples_do_not_depend_on_other_rows():
    """The number of draft tokens accepted in other rows has no effect either."""
    target_model, draft_model = target_and_draft()
    options = {
        "max_new_tokens": 23,
        "sampling": SAMPLING,
        "seed": 3,
        "speculator": DraftModel(draft_model, 3),
    }
    first, second = target_model(PROMPTS, **options), target_model(["abcabcab", "zzz", "x"], **options)
    assert (first[0], first[2]) == (second[0], second[2]) and first[1] != second[1]
    assert first[0].tokens != target_model(PROMPTS, **options | {"seed": 4})[0].tokens


def chi_square(counts, expected):
    """Return the chi-square statistic of counts, standardized by its mean and deviation."""
    possible = expected > 0
    assert not counts[~possible].any()
    distance = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    return (distance - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(0.7, top_k=3), SamplingParams(1.5, top_p=0.6), GREEDY],
    ids=str,
)
def test_accept_or_resample_follows_target_distribution(sampling):
    rows = 40_000
    p, q = (jnp.tile(jax.random.normal(jax.random.key(i), (1, 5)), (rows, 1)) for i in (1, 2))
    keys = row_keys(jax.random.key(0), jnp.arange(rows))
    draft_tokens = jax.vmap(jax.random.categorical)(
        row_keys(jax.random.key(9), jnp.arange(rows)), filter_logits(q, sampling)
    )
    tokens, accepted = accept_or_resample(keys, draft_tokens, p, q, sampling)
    target, drafted = (np.asarray(jax.nn.softmax(filter_logits(x[:1], sampling)))[0] for x in (p, q))
    acceptance_rate = np.minimum(target, drafted).sum()  # Leviathan et al. 2023, section 3.3
    assert abs(float(accepted.mean()) - acceptance_rate) < 5 * np.sqrt(
        max(acceptance_rate * (1 - acceptance_rate), 1e-9) / rows
    )
    counts = np.bincount(tokens, minlength=5)
    assert (
        chi_square(counts, rows * target) < 5
        if np.count_nonzero(target) > 1
        else counts.argmax() == target.argmax()
    )
    if acceptance_rate < 0.99:  # the draft distribution differs, and the test detects it
        assert abs(np.bincount(draft_tokens, minlength=5) - rows * target).max() > 0.01 * rows


def test_speculative_texts_follow_target_distribution():
    """Compare the counts of all texts of three tokens, sampled in many rows at once."""
    rows, vocabulary, prompt = 2048, 4, [1, 3, 2]
    (model, params), (draft, draft_params) = start(WINDOWED, vocabulary), start(SMALLER, vocabulary, 1)
    tokens = jnp.tile(jnp.array([prompt]), (rows, 1))
    decode_state, draft_state = (
        prefill(m, 12, p, tokens, jnp.ones_like(tokens)) for m, p in ((model, params), (draft, draft_params))
    )
    options = {"sampling": SamplingParams(), "eos_ids": (vocabulary,)}  # no token ends a text
    keys = row_keys(jax.random.key(0), jnp.arange(rows))
    state = init_speculation(decode_state, draft_state.cache, keys, looks_up=False, **options)
    first = np.asarray(state.last)[:, None]
    _, new_tokens, num_new = speculate(
        model, params, DraftSpeculator(draft, 2), draft_params, state, capacity=8, limit=2, **options
    )
    assert num_new >= 2
    texts = np.concatenate([first, np.asarray(new_tokens)[:, :2]], axis=1)
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
def test_accepted_draft_tokens_reduce_forward_passes(kind):
    model, params = start(WINDOWED, 9)
    tokens = jnp.array([[1, 3, 2]])
    decode_state = prefill(model, 60, params, tokens, jnp.ones_like(tokens))
    speculator, speculator_state = (
        DraftSpeculator(model, 3),
        prefill(model, 60, params, tokens, jnp.ones_like(tokens)).cache,
    )
    if kind == "lookup":
        speculator, speculator_state = PromptLookup(2, 3), jnp.full((1, 60), -1).at[:, :3].set(tokens)
    options = {"sampling": GREEDY, "eos_ids": (9,)}
    keys = row_keys(jax.random.key(0), jnp.arange(1))
    state = init_speculation(decode_state, speculator_state, keys, looks_up=kind == "lookup", **options)
    state, tokens, num_new = speculate(
        model, params, speculator, params, state, capacity=44, limit=40, **options
    )
    if kind == "itself":
        assert (int(state.passes), int(num_new)) == (10, 40)
    else:  # greedy text soon repeats
        assert 10 <= int(state.passes) < 30
    assert int(state.cache.index) == 3 + int(num_new) == int(state.cache.segments.sum())
    assert len(set(tokens[0, :40].tolist())) > 2


def test_unsupported_speculators_are_rejected(refuses):
    target_model, _ = target_and_draft()
    config = RecurrentConfig(depth=1, width=16)
    params = config.build(257).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    recurrent = Generator(config.build(257), params, target_model.tokenizer, 40, target_model.mesh)
    for model, speculator in ((recurrent, PromptLookup()), (target_model, DraftModel(recurrent))):
        with refuses("a recurrent model cannot rewind its state"):
            model(["x"], speculator=speculator)
    words = BPE(257).train(["a"])
    draft_model = generator(target_model.mesh, SMALLER)
    draft_model.tokenizer = words
    assert target_model.tokenizer.same_vocabulary(
        target_model.tokenizer
    ) and not target_model.tokenizer.same_vocabulary(words)
    with refuses("the draft model must have the same vocabulary"):
        target_model(["x"], speculator=DraftModel(draft_model))
    with refuses("PromptLookup.ngram is 0"):
        PromptLookup(0)
    with refuses("DraftModel.num_speculative_tokens is 0; it must be at least 1"):
        DraftModel(target_model, 0)
