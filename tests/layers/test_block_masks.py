"""Block masks that layers share: made once per step, in scanned, unrolled and recomputed stacks."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import block_mask
from attnlab.generation.kv_caches import KVCacheOptions
from attnlab.layers import AttentionConfig, Causal, Sliding, blocks
from attnlab.layers.attention import Documents, EncoderOutput
from attnlab.models import CaptionerConfig, DecoderConfig, EncoderConfig, Seq2SeqConfig, ViTConfig
from attnlab.models.resampler import Resampler, ResamplerConfig
from tests.attention.test_block_mask import documents
from tests.selection import long

B, T, DEPTH = 2, 256, 24
IDS = jnp.asarray(documents(B, T, 5))
CONFIG = DecoderConfig(
    depth=DEPTH, width=8, vocab_size=16, attention=AttentionConfig(heads=2), pattern=(Causal(), Sliding(9))
)


@pytest.fixture
def loops(monkeypatch):
    """Loop over lists of each row, although the blocks are small and few."""
    monkeypatch.setattr(block_mask, "MIN_SCORES", 1)
    monkeypatch.setattr(block_mask, "FEW_BLOCKS", 0)


def step(config):
    """Return the jitted loss and gradient of a decoder, and its arguments."""
    model = config.build(16)
    tokens = jnp.ones((B, T), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params, tokens, ids):
        return jnp.sum(model.apply(params, tokens, ids).astype(jnp.float32) ** 2)

    return model, jax.jit(jax.value_and_grad(loss)), (params, tokens, IDS)


def prefill(kind="contiguous", depth=DEPTH):
    """Return the jitted prefill of a decoder with a KV cache of this kind, and its arguments."""
    model, _, (params, tokens, ids) = step(replace(CONFIG, depth=depth, pattern=(Causal(), Sliding(99))))
    ids = (ids > 1).astype(jnp.int32)  # left padding

    def run(params, tokens, ids):
        cache = KVCacheOptions(kind, pages=99).apply(model.init_cache(B, 2 * T), model.config, ids)
        return model.apply(params, tokens, ids, cache=cache)

    return jax.jit(run), (params, tokens, ids)


def cross_attending(model, source, source_ids):
    """Return the jitted forward pass of a model of tokens and a source, and its arguments."""
    tokens = jnp.ones((B, T), jnp.int32)
    params = jax.eval_shape(lambda key: model.init(key, tokens, source=source), jax.random.key(0))

    def run(params, tokens, ids, source, source_ids):
        return model.apply(params, tokens, ids, source=source, source_segments=source_ids)

    return jax.jit(run), (params, tokens, IDS, source, source_ids)


def captioner():
    encoder = ViTConfig(depth=2, width=8, image=(32, 32, 1), patch=(4, 4), attention=AttentionConfig(heads=2))
    model = CaptionerConfig(encoder=encoder, decoder=CONFIG).build(16)
    return cross_attending(model, jnp.ones((B, 32, 32, 1)), None)


def seq2seq():
    encoder = EncoderConfig(depth=DEPTH, width=8, vocab_size=16, attention=AttentionConfig(heads=2))
    model = Seq2SeqConfig(encoder=encoder, decoder=CONFIG).build(16)
    return cross_attending(model, jnp.ones((B, T), jnp.int32), IDS)


def resampler():
    """Return the jitted resampling of packed documents of an encoder, and its arguments."""
    model = Resampler(ResamplerConfig(64, DEPTH), CONFIG.block(CONFIG.positions), scan=True, remat="none")
    hidden = jnp.ones((B, T, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), EncoderOutput(hidden, Documents(IDS)))

    def run(params, hidden, ids):
        return model.apply(params, EncoderOutput(hidden, Documents(ids))).hidden

    return jax.jit(run), (params, hidden, IDS)


# Programs of stacks of 24 layers, with the number of their distinct traced masks.
PROGRAMS = {
    "decoder": (lambda: step(CONFIG)[1:], 2),
    "recomputed decoder": (lambda: step(replace(CONFIG, remat="full"))[1:], 2),
    "prefill": (prefill, 2),
    "seq2seq": (seq2seq, 4),  # one of the encoder, two of self-attention, one of cross-attention
    "captioner": (captioner, 3),  # the encoder's is static
    "resampler": (resampler, 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_scanned_program_constructs_each_block_mask_once(loops, name):
    """Also in the backward pass, the layers construct none: all are outside the loops."""
    program, masks = PROGRAMS[name]
    run, arguments = program()
    text = run.lower(*arguments).compile().as_text()
    # One sort for the partial blocks, one for the full ones; the transpose is not used.
    sorts = re.findall(r' sort\(.*op_name="([^"]*)"', text)
    assert len(sorts) == 2 * masks
    assert all("make_block_mask" in name and "while" not in name for name in sorts), sorts


def test_an_unrolled_step_constructs_each_block_mask_once(loops):
    _, run, arguments = step(replace(CONFIG, scan=False))
    text = run.lower(*arguments).as_text()
    assert len(re.findall(r"call @argsort", text)) == 2 * 2  # partial and full blocks


def test_a_backend_without_blocks_gets_no_block_mask(loops):
    """Stored attention weights need `reference`, which uses no blocks."""
    model, _, (params, *inputs) = step(replace(CONFIG, depth=2))

    def run(params, *inputs):
        return model.apply(params, *inputs, mutable=["intermediates"])

    assert "argsort" not in jax.jit(run).lower(params, *inputs).as_text()


@pytest.mark.parametrize("options", [{"scan": False, "remat": "dots"}, long({})], ids=str)
def test_shared_block_masks_change_no_result(loops, options, monkeypatch):
    config = replace(CONFIG, depth=2, **options)
    model, run, (params, *inputs) = step(config)
    params = model.init(jax.random.key(0), inputs[0])
    got = run(params, *inputs)
    monkeypatch.setattr(blocks, "share_block_masks", lambda config, specs, x, caches, inputs, *flags: inputs)
    expected = step(config)[1](params, *inputs)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["contiguous", "rolling"])
def test_block_masks_of_a_cached_prefill_change_no_result(loops, kind, monkeypatch):
    """A rolling cache orders its keys by itself, so that its layers share no block mask."""
    run, (shapes, *inputs) = prefill(kind, depth=2)
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), shapes)
    got, _ = run(params, *inputs)
    monkeypatch.setattr(blocks, "share_block_masks", lambda config, specs, x, caches, inputs, *flags: inputs)
    expected, _ = prefill(kind, depth=2)[0](params, *inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
