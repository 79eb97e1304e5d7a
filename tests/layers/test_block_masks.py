"""Block masks that layers share: made once per step, in scanned, unrolled and recomputed stacks."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import block_mask
from attnlab.layers import AttentionConfig, Causal, Sliding, blocks
from attnlab.models import DecoderConfig
from tests.attention.test_block_mask import documents

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


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_scanned_step_constructs_each_block_mask_once(loops, remat):
    """24 layers of two specs, forward and backward: two block masks, outside the loops."""
    _, run, arguments = step(replace(CONFIG, remat=remat))
    text = run.lower(*arguments).compile().as_text()
    # One sort for the partial blocks, one for the full ones; the transpose is not used.
    sorts = re.findall(r' sort\(.*op_name="([^"]*)"', text)
    assert len(sorts) == 2 * 2
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


@pytest.mark.parametrize("options", [{}, {"scan": False, "remat": "dots"}], ids=str)
def test_shared_block_masks_change_no_result(loops, options, monkeypatch):
    config = replace(CONFIG, depth=2, **options)
    model, run, (params, *inputs) = step(config)
    params = model.init(jax.random.key(0), inputs[0])
    got = run(params, *inputs)
    monkeypatch.setattr(blocks, "share_block_masks", lambda config, specs, x, inputs, *flags: inputs)
    expected = step(config)[1](params, *inputs)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)
