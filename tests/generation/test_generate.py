from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import causal, chunked, key_lengths
from attnlab.data import Bytes
from attnlab.generation import Generator, SamplingParams
from attnlab.generation import generate as module
from attnlab.layers import AttentionConfig, Bidirectional, Causal, LayerSpec, Sliding
from attnlab.models import DecoderConfig, Learned
from attnlab.sharding import BATCH_AXES

TOKENIZER = Bytes().train([])
GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 40
CONFIG = DecoderConfig(
    depth=2,
    width=16,
    attention=AttentionConfig(heads=4, kv_heads=2),
    pattern=(Sliding(5), Causal()),
    tied=False,
)


def generator(mesh, config=CONFIG, context=CONTEXT):
    model = config.build(TOKENIZER.vocab_size)
    rng = np.random.default_rng(0)

    def draw(path, x):  # large weights: greedy tokens are unambiguous and vary
        mean = 1.0 if path[-1].key == "scale" else 0.0
        sharding = jax.NamedSharding(mesh, x.sharding.spec)
        return jax.device_put(jnp.asarray(mean + 0.3 * rng.normal(size=x.shape), x.dtype), sharding)

    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=jax.NamedSharding(mesh, P(BATCH_AXES)))
        shapes = jax.eval_shape(model.init, jax.random.key(0), rows)["params"]
        params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Generator(model, params, TOKENIZER, context, mesh)


@pytest.fixture(scope="module")
def unsharded():
    from attnlab.sharding import make_mesh, parse_mesh

    return generator(make_mesh(parse_mesh("single", 1)))


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def by_full_forwards(g, prompt, count):
    ids = [g.tokenizer.eos_id, *g.tokenizer.encode(prompt)]
    with jax.set_mesh(g.mesh):
        for _ in range(count):
            padded = np.zeros((1, CONTEXT), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(forward(g.model, g.params, jnp.asarray(padded))[0, len(ids) - 1].argmax()))
    return ids[-count:]


def test_greedy_decoding_matches_full_forward_passes(unsharded):
    for prompt in ("abc", "de"):
        (got,) = unsharded([prompt], max_new_tokens=19, sampling=GREEDY)
        expected = by_full_forwards(unsharded, prompt, 19)
        if unsharded.tokenizer.eos_id in expected:
            expected = expected[: expected.index(unsharded.tokenizer.eos_id)]
        assert got.tokens == expected and len(set(expected)) > 2
        assert got.finish_reason == ("length" if len(expected) == 19 else "eos")


def test_batch_of_unequal_lengths_matches_single_prompts(unsharded):
    prompts = ["abcdefgh", "hello wor", "x" * 14]
    batched = unsharded(prompts, max_new_tokens=17, sampling=GREEDY)
    for prompt, row in zip(prompts, batched, strict=True):
        assert [row] == unsharded([prompt], max_new_tokens=17, sampling=GREEDY)


@dataclass(frozen=True)
class Chunked(LayerSpec):
    def mask(self, offset=0):
        return chunked(5, offset)


@dataclass(frozen=True)
class FirstTokensAndBlocks(LayerSpec):
    """Causal attention to the first three tokens and to the last two blocks of three."""

    def mask(self, offset=0):
        return causal(offset) & (key_lengths(3) | (lambda b, h, q, k: k // 3 >= (q + offset) // 3 - 1))


def test_absolute_position_masks_count_from_first_token_of_row(mesh_of):
    g = generator(mesh_of("single"), replace(CONFIG, pattern=(Chunked(), FirstTokensAndBlocks())))
    prompts = ["abcdefgh", "hel", "x" * 14]
    batched = g(prompts, max_new_tokens=17, sampling=GREEDY)
    for prompt, row in zip(prompts, batched, strict=True):
        expected = by_full_forwards(g, prompt, 17)
        assert row.tokens == expected[: len(row.tokens)] and len(set(row.tokens)) > 2


def test_samples_do_not_depend_on_other_rows(unsharded):
    first = unsharded(["abc", "q", "zz"], max_new_tokens=17, seed=3)
    other = unsharded(["abc", "a much longer one", "zz", "abc"], max_new_tokens=17, seed=3)
    assert first[0] == other[0] and first[2] == other[2]
    assert other[3].tokens != other[0].tokens  # the same prompt in another row
    assert unsharded(["abc", "q", "zz"], max_new_tokens=17, seed=4)[0].tokens != first[0].tokens
    samples = unsharded(["abc"], max_new_tokens=17, num_samples=3, seed=3)
    assert samples[0] == first[0] and samples[1].tokens != samples[0].tokens


@pytest.mark.parametrize("text", ["data:2,fsdp:2,tensor:2"])
def test_tokens_do_not_depend_on_mesh(unsharded, mesh_of, text):
    prompts = ["a", "hello", "b" * 9]
    on_mesh = generator(mesh_of(text))
    assert on_mesh(prompts, max_new_tokens=9, sampling=GREEDY) == unsharded(
        prompts, max_new_tokens=9, sampling=GREEDY
    )
    assert on_mesh(prompts, max_new_tokens=9, seed=5) == unsharded(prompts, max_new_tokens=9, seed=5)


def test_generation_stops_at_context_length(unsharded, refuses):
    (row,) = unsharded(["a" * 30], max_new_tokens=100, sampling=SamplingParams(temperature=2.0))
    assert row.finish_reason in ("context", "eos") and len(row.tokens) <= CONTEXT - 31
    if row.finish_reason == "context":
        assert len(row.tokens) == CONTEXT - 31
    (row,) = unsharded(["a" * 38], max_new_tokens=1, sampling=GREEDY)
    assert len(row.tokens) == 1 and row.finish_reason == "length"
    with refuses("40 tokens", "of the model has 40", "at most 39"):
        unsharded(["short", "a" * 39], max_new_tokens=1)
    assert unsharded(["abc"], max_new_tokens=0)[0].tokens == []


def test_learned_positions_reach_end_of_context(mesh_of):
    config = DecoderConfig(
        depth=1, width=16, attention=AttentionConfig(heads=2), positions=Learned(CONTEXT), tied=False
    )
    g = generator(mesh_of("single"), config)
    (row,) = g(["a" * 20], max_new_tokens=CONTEXT, sampling=GREEDY)
    expected = by_full_forwards(g, "a" * 20, CONTEXT - 21)
    assert row.tokens == expected[: len(row.tokens)] and row.finish_reason in ("context", "eos")


def test_bidirectional_models_and_invalid_stops_are_rejected(unsharded, refuses):
    config = DecoderConfig(depth=1, width=16, attention=AttentionConfig(heads=2), pattern=(Bidirectional(),))
    with refuses("Bidirectional"):
        Generator(config.build(9), {}, TOKENIZER, 8, unsharded.mesh)
    for stop in ("abc", ["a", ""]):
        with refuses("stop must be a list"):
            unsharded(["x"], stop=stop)


def test_similar_shapes_share_compiled_programs(unsharded):
    unsharded(["abc", "abcd"], max_new_tokens=17, sampling=GREEDY)
    before = module._start._cache_size(), module._decode_chunk._cache_size()
    unsharded(["abcde", "xyz"], max_new_tokens=30, sampling=GREEDY, seed=9)
    unsharded(["ab", "abcdefg"], max_new_tokens=20, sampling=GREEDY)
    unsharded(["ab", "abcdefg"], max_new_tokens=20, sampling=SamplingParams(temperature=0.7))
    assert (module._start._cache_size(), module._decode_chunk._cache_size()) == before


def test_stream_concatenates_to_completions(unsharded):
    pieces = {0: "", 1: ""}

    def stream(row, text):
        pieces[row] += text

    rows = unsharded(["abc", "de"], max_new_tokens=21, stop=["e"], stream=stream, seed=1)
    assert [pieces[0], pieces[1]] == [row.text for row in rows]
    assert any(row.text for row in rows)
