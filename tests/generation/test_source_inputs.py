"""Generation from source inputs compared with full forward passes."""

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

    def draw(path, x):  # large weights, largest in cross-attention: greedy tokens vary with the source
        mean = 1.0 if path[-1].key == "scale" else 0.0
        scale = 1.4 if "cross_attention" in str(path) else 0.7
        sharding = jax.NamedSharding(mesh, x.sharding.spec)
        return jax.device_put(jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype), sharding)

    with jax.set_mesh(mesh):
        rows = jnp.zeros((8, 4), jnp.int32, out_sharding=out_sharding("batch", None))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), rows, source=rows))["params"]
        params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Generator(model, params, TOKENIZER, CONTEXT, mesh)


@pytest.fixture(scope="module")
def unsharded():
    return generator(make_mesh(parse_mesh("single", 1)))


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, source, source_segments):
    return model.apply({"params": params}, tokens, source=source, source_segments=source_segments)


def logits(g, ids, source):
    """Return the logits of the full model after each of these ids."""
    tokens, source_tokens, source_segments = (np.zeros((1, n), np.int32) for n in (CONTEXT, 12, 12))
    encoded = TOKENIZER.encode_source(source)
    tokens[0, : len(ids)], source_tokens[0, : len(encoded)], source_segments[0, : len(encoded)] = (
        ids,
        encoded,
        1,
    )
    with jax.set_mesh(g.mesh):
        arrays = map(jnp.asarray, (tokens, source_tokens, source_segments))
        return np.asarray(forward(g.model, g.params, *arrays)[0, : len(ids)])


def by_full_forwards(g, source, prefix, count):
    """Decode greedily with a full forward pass per token; return the new tokens."""
    ids = list(prefix)
    for _ in range(count):
        ids.append(int(logits(g, ids, source)[-1].argmax()))
    return ids[len(prefix) :]


def test_greedy_decoding_matches_full_forward_passes(unsharded):
    completions = unsharded(sources=SOURCES, max_new_tokens=12, sampling=GREEDY)
    for source, row in zip(SOURCES, completions, strict=True):
        assert row.tokens == by_full_forwards(unsharded, source, [7], 12)[: len(row.tokens)]
        assert (row.source, row.prompt, row.head) == (source, "", f"{source}\n")
    assert len({tuple(row.tokens) for row in completions}) == 3  # the outputs depend on the sources
    assert (
        unsharded(sources=SOURCES, max_new_tokens=12, sampling=GREEDY, speculator=DraftModel(unsharded, 2))
        == completions
    )


def test_output_starts_with_forced_tokens_after_prompt(unsharded):
    (row,) = unsharded(["xy"], sources=["abc"], forced_decoder_ids=(9, 8), max_new_tokens=9, sampling=GREEDY)
    prefix = [7, *TOKENIZER.encode("xy")]
    assert row.tokens[:2] == [9, 8]
    (named,) = unsharded(["xy"], sources=["abc"], forced_decoder_ids=("a", 8), max_new_tokens=9)
    assert named.tokens[:2] == [TOKENIZER.encode("a")[0], 8]
    assert row.tokens[2:] == by_full_forwards(unsharded, "abc", [*prefix, 9, 8], 7)[: len(row.tokens) - 2]
    (from_defaults,) = generator(unsharded.mesh, with_defaults(forced_decoder_ids=(9, 8)))(
        ["xy"], sources=["abc"], max_new_tokens=9, sampling=GREEDY
    )
    assert from_defaults == row


def test_suppressed_tokens_and_forced_eos(unsharded):
    """Every decoding method obeys them, even if the draft model proposes suppressed tokens."""
    restricted = with_defaults(
        forced_decoder_ids=(9,),
        suppress_tokens=tuple(range(60, 250)),
        begin_suppress_tokens=(3, *range(30, 60)),
        forced_eos=True,
    )
    unrestricted, g = (
        generator(unsharded.mesh, config) for config in (with_defaults(forced_decoder_ids=(9,)), restricted)
    )
    defaults = restricted.generation
    suppressed = set(defaults.suppress_tokens)
    first = {*suppressed, *defaults.begin_suppress_tokens}
    unrestricted_rows = unrestricted(sources=SOURCES, max_new_tokens=9, sampling=GREEDY)
    assert any(suppressed & {*row.tokens} for row in unrestricted_rows) and any(
        row.tokens[1] in first for row in unrestricted_rows
    )
    completions = {}
    for name, options in {
        "greedy": {"sampling": GREEDY},
        "draft model": {"sampling": GREEDY, "speculator": DraftModel(unrestricted, 2)},
        "prompt lookup": {"sampling": GREEDY, "speculator": PromptLookup(1, 2)},
        "sampled": {"sampling": SamplingParams(2.0)},
        "sampled, draft model": {"sampling": SamplingParams(2.0), "speculator": DraftModel(unrestricted, 2)},
    }.items():
        completions[name] = g(sources=SOURCES, max_new_tokens=9, **options)
        for row in completions[name]:
            assert not suppressed & {*row.tokens[1:]} and row.tokens[1] not in first
            assert len(row.tokens) == 8 and row.finish_reason == "length"  # the ninth is EOS
    assert completions["greedy"] == completions["draft model"] == completions["prompt lookup"]
    for source, row in zip(SOURCES, completions["greedy"], strict=True):
        ids = [7, 9]
        for i in range(7):
            last = logits(g, ids, source)[-1].copy()
            last[[*(suppressed if i else first)]] = -np.inf
            ids.append(int(last.argmax()))
        assert row.tokens == ids[1:]
    for row in g.beam_search(None, BeamSearchOptions(1), sources=SOURCES, max_new_tokens=9):
        (same,) = (other for other in completions["greedy"] if other.source == row.source)
        assert (row.tokens, row.finish_reason) == (same.tokens, same.finish_reason)


def test_beam_search_rows_are_independent(unsharded):
    options = {"options": BeamSearchOptions(3, GNMTLengthPenalty()), "max_new_tokens": 8, "num_samples": 2}
    batched = unsharded.beam_search(None, sources=SOURCES, **options)
    single = unsharded.beam_search(None, sources=SOURCES[1:2], **options)
    for row, expected in zip(batched[2:4], single, strict=True):
        assert row.tokens == expected.tokens and abs(row.score - expected.score) < 1e-4


def test_beam_score_counts_length_but_not_probability_of_forced_tokens(unsharded):
    (row,) = unsharded.beam_search(
        None,
        BeamSearchOptions(1, PowerLengthPenalty(1.0)),
        sources=["abc"],
        forced_decoder_ids=(9,),
        max_new_tokens=6,
    )
    assert row.tokens == [9, *by_full_forwards(unsharded, "abc", [7, 9], 5)] and row.finish_reason == "length"
    log_probs = np.asarray(jax.nn.log_softmax(logits(unsharded, [7, *row.tokens[:-1]], "abc")))
    total = sum(log_probs[i, token] for i, token in enumerate(row.tokens) if i >= 1)
    np.testing.assert_allclose(row.score, total / 6, rtol=1e-4)


@pytest.mark.long
def test_tokens_do_not_depend_on_mesh(unsharded, mesh_of):
    config = with_defaults(suppress_tokens=tuple(range(60, 200)), forced_eos=True)
    unsharded, on_mesh = (
        generator(unsharded.mesh, config),
        generator(mesh_of("data:2,fsdp:2,tensor:2"), config),
    )
    for sampling in (GREEDY, SamplingParams(top_k=5)):
        options = {"sources": SOURCES, "max_new_tokens": 6, "sampling": sampling, "seed": 3}
        assert on_mesh(**options) == unsharded(**options)
    completions, expected = (
        g.beam_search(None, BeamSearchOptions(3, GNMTLengthPenalty()), sources=SOURCES, max_new_tokens=6)
        for g in (on_mesh, unsharded)
    )
    assert [row.tokens for row in completions] == [row.tokens for row in expected]


def test_invalid_inputs_are_rejected(unsharded, refuses):
    with refuses("needs sources"):
        unsharded(["abc"])
    with refuses("must be texts"):
        unsharded(sources=[np.zeros((3, 2))])
    with refuses("length 21", "positions.length=12"):
        unsharded(sources=["x" * 20])
    with refuses("2 prompts but 1 sources"):
        unsharded(["a", "b"], sources=["a"])
    with refuses("has no token '<|en|>'"):
        unsharded(sources=["a"], forced_decoder_ids=("<|en|>",))
    with refuses("over the 2 forced tokens"):
        unsharded(sources=["a"], forced_decoder_ids=(1, 2), max_new_tokens=2)
    decoder = Generator(CONFIG.decoder.build(9), {}, TOKENIZER, 8, unsharded.mesh)
    with refuses("needs prompts"):
        decoder()
    with refuses("takes only prompts, not sources"):
        decoder(sources=["a"])
