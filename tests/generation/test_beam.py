import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.generation import BeamSearchOptions, GNMTLengthPenalty, PowerLengthPenalty, beam_search, prefill
from attnlab.sharding import BATCH_AXES
from tests.generation.models import (
    EOS,
    WINDOWED,
    assert_same,
    next_log_probs,
    padded,
    search,
    start,
    until_end,
)
from tests.selection import sample

VOCAB = 7
PROMPTS = [[3, 1, 4, 1, 5], [2, 6], [5, 3, 5, 2, 1, 6, 3]]
PENALTIES = {
    "power": (PowerLengthPenalty(1.0), lambda n: n),
    "none": (PowerLengthPenalty(0.0), lambda n: 1),
    "negative": (PowerLengthPenalty(-0.5), lambda n: n**-0.5),
    "gnmt": (GNMTLengthPenalty(0.6), lambda n: ((5 + n) / 6) ** 0.6),
}


def beam_search_by_loop(model, params, prompt, steps, count, penalty):
    """Run beam search as a loop over lists, with a full forward pass per step."""
    growing, finished = [(0.0, [])], []
    for length in range(1, steps + 1):
        log_probs = next_log_probs(model, params, [prompt + text for _, text in growing])
        candidates = [
            (score + log_probs[i, token], [*text, token])
            for i, (score, text) in enumerate(growing)
            for token in range(log_probs.shape[1])
        ]
        candidates.sort(key=lambda c: -c[0])
        ends = [c[1][-1] == EOS or length == steps for c in candidates]
        finished += [
            (s / penalty(length), t) for (s, t), end in zip(candidates[:count], ends, strict=False) if end
        ]
        finished = sorted(finished, key=lambda f: -f[0])[:count]
        growing = [c for c, end in zip(candidates, ends, strict=True) if not end][:count]
        if len(finished) == count and growing and growing[0][0] / penalty(length) <= finished[-1][0]:
            break
    return [(text, score) for score, text in finished]


@pytest.mark.parametrize("name", sample(PENALTIES, every=2))
def test_beam_search_matches_loop(name):
    model, params = start(WINDOWED, VOCAB)
    penalty, of_length = PENALTIES[name]
    got = search(model, params, PROMPTS, steps=8, num_beams=3, length_penalty=penalty)
    for prompt, texts in zip(PROMPTS, got, strict=True):
        assert_same(texts, beam_search_by_loop(model, params, prompt, 8, 3, of_length))
    assert len({len(text) for texts in got for text, _ in texts}) > 1  # some texts ended early


@pytest.mark.parametrize("name", sample(PENALTIES, every=2))
def test_beam_search_with_enough_beams_is_exhaustive(name):
    model, params = start(WINDOWED, 4)
    penalty, of_length = PENALTIES[name]
    steps, prompt = 4, [3, 1, 2]
    tokens = range(4)
    texts = [t for t in itertools.product(tokens, repeat=steps) if EOS not in t[:-1]]
    texts += [(*t, EOS) for n in range(steps - 1) for t in itertools.product(tokens[1:], repeat=n)]
    scores = np.zeros(len(texts))
    for i in range(steps):
        log_probs = next_log_probs(model, params, [[*prompt, *t[:i]] for t in texts])
        scores += [row[t[i]] if i < len(t) else 0 for row, t in zip(log_probs, texts, strict=True)]
    scores = [s / of_length(len(t)) for s, t in zip(scores, texts, strict=True)]
    expected = sorted(zip(map(list, texts), scores, strict=True), key=lambda x: -x[1])
    # Beams in excess of the number of texts stay empty.
    (got,) = search(model, params, [prompt], steps, num_beams=len(texts) + 5, length_penalty=penalty)
    assert [s for _, s in got[len(texts) :]] == [-np.inf] * 5
    assert_same(got[: len(texts)], expected)


def test_single_beam_is_greedy():
    model, params = start(WINDOWED, VOCAB)
    ((text, score),), *_ = search(model, params, PROMPTS, steps=9, num_beams=1)
    expected, total = [], 0.0
    while len(expected) < 9 and EOS not in expected:
        (log_probs,) = next_log_probs(model, params, [PROMPTS[0] + expected])
        expected.append(int(log_probs.argmax()))
        total += log_probs.max()
    assert text == expected and abs(score - total / len(text)) < 1e-5


def test_batch_rows_are_independent():
    model, params = start(WINDOWED, VOCAB)
    batched = search(model, params, PROMPTS, steps=8, num_beams=3)
    for prompt, texts in zip(PROMPTS, batched, strict=True):
        assert_same(search(model, params, [prompt], steps=8, num_beams=3)[0], texts)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "count"), [("data:2,fsdp:2,tensor:2", 4), ("single", 1)])
def test_beam_search_does_not_depend_on_mesh(mesh_of, text, count):
    model, params = start(WINDOWED, VOCAB)
    prompts = [*PROMPTS, [1, 2]][:count]
    expected = search(model, params, prompts, steps=6, num_beams=3)
    mesh = mesh_of(text)
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct((count, 4), jnp.int32, sharding=jax.NamedSharding(mesh, P(BATCH_AXES)))
        shapes = jax.eval_shape(model.init, jax.random.key(0), rows)["params"]
        sharded_params = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        tokens, segments = (jax.device_put(x, rows.sharding) for x in padded(prompts))
        decode_state = prefill(model, tokens.shape[1] + 6, sharded_params, tokens, segments)
        hypotheses = beam_search(
            model,
            sharded_params,
            decode_state,
            num_beams=3,
            length_penalty=PowerLengthPenalty(),
            eos_ids=(EOS,),
            slots=6,
            steps=6,
        )
        assert jax.typeof(hypotheses.tokens).sharding.spec[0] == BATCH_AXES
    for texts, scores, row in zip(*map(np.asarray, hypotheses), expected, strict=True):
        assert_same([*zip(map(until_end, texts.tolist()), scores, strict=True)], row)


def test_invalid_options_are_rejected(refuses):
    with refuses("num_beams is 0", "at least 1"):
        BeamSearchOptions(num_beams=0)
    with refuses("alpha is inf", "finite"):
        GNMTLengthPenalty(float("inf"))
