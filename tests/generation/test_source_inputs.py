"""Text of a source: what is written is what the full model would, however it is searched for or laid out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import Bytes
from attnlab.generation import (
    BeamSearchOptions,
    DraftModel,
    Generator,
    GNMTLengthPenalty,
    PowerLengthPenalty,
    PromptLookup,
    SamplingParams,
)
from attnlab.layers import AttentionConfig, LayerNormConfig, RelativeBias
from attnlab.models import DecoderConfig, EncoderConfig, GenerationDefaults, Learned, Seq2SeqConfig
from attnlab.sharding import make_mesh, out_sharding, parse_mesh

TOKENIZER = Bytes().train([])
GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 24
HALF = {"depth": 2, "width": 16, "attention": AttentionConfig(heads=4)}
CONFIG = Seq2SeqConfig(
    EncoderConfig(**HALF, norm=LayerNormConfig(), positions=Learned(12)),
    DecoderConfig(**HALF, positions=RelativeBias(8, 16), tied=False),
    generation=GenerationDefaults(decoder_start_token_id=7),
)
SOURCES = ["hello wor", "abc", "de"]


def with_defaults(**changes):
    """`CONFIG` with other generation defaults."""
    return replace(CONFIG, generation=replace(CONFIG.generation, **changes))


def generator(mesh, config=CONFIG):
    model = config.build(TOKENIZER.vocab_size)
    rng = np.random.default_rng(1)

    def draw(path, x):  # so large that the next token is decided, and varied, most of all by the source
        mean = 1.0 if path[-1].key == "scale" else 0.0
        scale = 1.4 if "cross_attention" in str(path) else 0.7
        where = jax.NamedSharding(mesh, x.sharding.spec)
        return jax.device_put(jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype), where)

    with jax.set_mesh(mesh):
        rows = jnp.zeros((8, 4), jnp.int32, out_sharding=out_sharding("batch", None))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), rows, source=rows))["params"]
        params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Generator(model, params, TOKENIZER, CONTEXT, mesh)


@pytest.fixture(scope="module")
def one():
    return generator(make_mesh(parse_mesh("single", 1)))


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, source, there):
    return model.apply({"params": params}, tokens, source=source, source_segments=there)


def logits(g, ids, source):
    """Of the full model, after each of these ids."""
    tokens, read, there = (np.zeros((1, n), np.int32) for n in (CONTEXT, 12, 12))
    own = TOKENIZER.encode_source(source)
    tokens[0, : len(ids)], read[0, : len(own)], there[0, : len(own)] = ids, own, 1
    with jax.set_mesh(g.mesh):
        arrays = map(jnp.asarray, (tokens, read, there))
        return np.asarray(forward(g.model, g.params, *arrays)[0, : len(ids)])


def by_full_forwards(g, source, begin, count):
    """What a greedy choice adds, each token of a forward pass over all of it."""
    ids = list(begin)
    for _ in range(count):
        ids.append(int(logits(g, ids, source)[-1].argmax()))
    return ids[len(begin) :]


def test_greedy_is_the_argmax_of_full_forwards(one):
    found = one(sources=SOURCES, max_new_tokens=12, sampling=GREEDY)
    for source, row in zip(SOURCES, found, strict=True):
        assert row.tokens == by_full_forwards(one, source, [7], 12)[: len(row.tokens)]
        assert (row.source, row.prompt, row.head) == (source, "", f"{source}\n")
    assert len({tuple(row.tokens) for row in found}) == 3  # they depend on their sources
    assert one(sources=SOURCES, max_new_tokens=12, sampling=GREEDY, speculator=DraftModel(one, 2)) == found


def test_prompts_and_forced_tokens_come_first(one):
    (row,) = one(["xy"], sources=["abc"], forced_decoder_ids=(9, 8), max_new_tokens=9, sampling=GREEDY)
    begin = [7, *TOKENIZER.encode("xy")]
    assert row.tokens[:2] == [9, 8]
    (named,) = one(["xy"], sources=["abc"], forced_decoder_ids=("a", 8), max_new_tokens=9)
    assert named.tokens[:2] == [TOKENIZER.encode("a")[0], 8]
    assert row.tokens[2:] == by_full_forwards(one, "abc", [*begin, 9, 8], 7)[: len(row.tokens) - 2]
    (own,) = generator(one.mesh, with_defaults(forced_decoder_ids=(9, 8)))(
        ["xy"], sources=["abc"], max_new_tokens=9, sampling=GREEDY
    )
    assert own == row


def test_what_is_never_written_is_not_and_what_is_longest_ends(one):
    """However it is drawn; with guesses of a model that would write it, too."""
    ruled = with_defaults(
        forced_decoder_ids=(9,),
        suppress_tokens=tuple(range(60, 250)),
        begin_suppress_tokens=(3, *range(30, 60)),
        forced_eos=True,
    )
    free, g = (generator(one.mesh, config) for config in (with_defaults(forced_decoder_ids=(9,)), ruled))
    defaults = ruled.generation
    barred = set(defaults.suppress_tokens)
    first = {*barred, *defaults.begin_suppress_tokens}
    before = free(sources=SOURCES, max_new_tokens=9, sampling=GREEDY)
    assert any(barred & {*row.tokens} for row in before) and any(row.tokens[1] in first for row in before)
    found = {}
    for name, options in {
        "greedy": {"sampling": GREEDY},
        "guessed": {"sampling": GREEDY, "speculator": DraftModel(free, 2)},
        "looked up": {"sampling": GREEDY, "speculator": PromptLookup(1, 2)},
        "drawn": {"sampling": SamplingParams(2.0)},
        "drawn, guessed": {"sampling": SamplingParams(2.0), "speculator": DraftModel(free, 2)},
    }.items():
        found[name] = g(sources=SOURCES, max_new_tokens=9, **options)
        for row in found[name]:
            assert not barred & {*row.tokens[1:]} and row.tokens[1] not in first
            assert len(row.tokens) == 8 and row.finish_reason == "length"  # the ninth is the end
    assert found["greedy"] == found["guessed"] == found["looked up"]
    for source, row in zip(SOURCES, found["greedy"], strict=True):
        ids = [7, 9]
        for i in range(7):
            last = logits(g, ids, source)[-1].copy()
            last[[*(barred if i else first)]] = -np.inf
            ids.append(int(last.argmax()))
        assert row.tokens == ids[1:]
    for row in g.beam_search(None, BeamSearchOptions(1), sources=SOURCES, max_new_tokens=9):
        (same,) = (other for other in found["greedy"] if other.source == row.source)
        assert (row.tokens, row.finish_reason) == (same.tokens, same.finish_reason)


def test_rows_of_a_search_are_each_alone(one):
    options = {"options": BeamSearchOptions(3, GNMTLengthPenalty()), "max_new_tokens": 8, "num_samples": 2}
    together = one.beam_search(None, sources=SOURCES, **options)
    alone = one.beam_search(None, sources=SOURCES[1:2], **options)
    for row, expected in zip(together[2:4], alone, strict=True):
        assert row.tokens == expected.tokens and abs(row.score - expected.score) < 1e-4


def test_forced_tokens_of_a_search_have_a_length_and_no_probability(one):
    (row,) = one.beam_search(
        None,
        BeamSearchOptions(1, PowerLengthPenalty(1.0)),
        sources=["abc"],
        forced_decoder_ids=(9,),
        max_new_tokens=6,
    )
    assert row.tokens == [9, *by_full_forwards(one, "abc", [7, 9], 5)] and row.finish_reason == "length"
    log_probs = np.asarray(jax.nn.log_softmax(logits(one, [7, *row.tokens[:-1]], "abc")))
    total = sum(log_probs[i, token] for i, token in enumerate(row.tokens) if i >= 1)
    np.testing.assert_allclose(row.score, total / 6, rtol=1e-4)


def test_a_mesh_changes_no_token(one, mesh_of):
    config = with_defaults(suppress_tokens=tuple(range(60, 200)), forced_eos=True)
    one, on_mesh = generator(one.mesh, config), generator(mesh_of("data:2,fsdp:2,tensor:2"), config)
    for sampling in (GREEDY, SamplingParams(top_k=5)):
        options = {"sources": SOURCES, "max_new_tokens": 6, "sampling": sampling, "seed": 3}
        assert on_mesh(**options) == one(**options)
    found, expected = (
        g.beam_search(None, BeamSearchOptions(3, GNMTLengthPenalty()), sources=SOURCES, max_new_tokens=6)
        for g in (on_mesh, one)
    )
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_what_cannot_be_read_is_refused(one, refuses):
    with refuses("needs sources"):
        one(["abc"])
    with refuses("must be texts"):
        one(sources=[np.zeros((3, 2))])
    with refuses("length 21", "positions.length=12"):
        one(sources=["x" * 20])
    with refuses("2 prompts but 1 sources"):
        one(["a", "b"], sources=["a"])
    with refuses("has no token '<|en|>'"):
        one(sources=["a"], forced_decoder_ids=("<|en|>",))
    with refuses("over the 2 forced tokens"):
        one(sources=["a"], forced_decoder_ids=(1, 2), max_new_tokens=2)
    decoder = Generator(CONFIG.decoder.build(9), {}, TOKENIZER, 8, one.mesh)
    with refuses("needs prompts"):
        decoder()
    with refuses("takes only prompts, not sources"):
        decoder(sources=["a"])
