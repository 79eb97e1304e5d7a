"""FLOPs computed from the config against XLA's cost analysis of the program."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import (
    AttentionConfig,
    Bidirectional,
    Causal,
    GatedMLPConfig,
    MLPConfig,
    Sliding,
    mixers,
    scores,
)
from attnlab.models import DecoderConfig
from attnlab.train.flops import PEAK, peak_flops

LENGTH, VOCAB, ROWS = 64, 96, 2


@pytest.mark.parametrize(
    "feed_forward", [MLPConfig(width=96), GatedMLPConfig(width=64)], ids=["MLP", "GatedMLP"]
)
@pytest.mark.parametrize("kv_heads", [None, 2], ids=["all heads", "grouped"])
def test_token_flops_equal_cost_analysis(feed_forward, kv_heads):
    """Compare within 6%: the model is wide, so that matrix products dominate.

    Attention is bidirectional, so that every pair counts.
    """
    config = DecoderConfig(
        depth=2,
        width=128,
        attention=AttentionConfig(heads=4, kv_heads=kv_heads),
        feed_forward=feed_forward,
        pattern=(Bidirectional(),),
        scan=False,
    )
    model, tokens = config.build(VOCAB), jnp.zeros((ROWS, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    analysis = jax.jit(model.apply).lower(params, tokens).compile().cost_analysis()
    counted = config.token_flops(VOCAB, LENGTH)
    expected = (counted.weights + counted.attention) * ROWS * LENGTH
    assert analysis["flops"] == pytest.approx(expected, rel=0.06)
    assert counted.training == 3 * (counted.weights + counted.attention)


WIDE = DecoderConfig(
    depth=1,
    width=128,
    attention=AttentionConfig(heads=4),
    feed_forward=MLPConfig(width=8),
    pattern=(Bidirectional(),),
    scan=False,
)


@functools.cache
def analyzed_and_counted(spec):
    """Return the FLOPs per token of a model with a layer of this spec: XLA's, and those counted."""
    config = replace(WIDE, pattern=(spec,))
    model, tokens = config.build(VOCAB), jnp.zeros((1, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    analyzed = jax.jit(model.apply).lower(params, tokens).cost_analysis()["flops"] / LENGTH
    counted = config.token_flops(VOCAB, LENGTH)
    return np.array([analyzed, counted.weights + counted.attention])


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": mixers.TalkingHeads()},
        {"mixer": mixers.GatedOutput()},
        {"mixer": mixers.Differential()},
        {"mixer": mixers.LatentAttention(96, 32, query_rank=64)},
        {"score": scores.Shaw(32)},
    ],
    ids=lambda options: repr(*options.values()),
)
def test_mixers_and_scores_add_the_flops_of_cost_analysis(options):
    """Compare the difference to plain attention within 15%: XLA counts the second softmax too."""
    analyzed, counted = analyzed_and_counted(Bidirectional(**options)) - analyzed_and_counted(Bidirectional())
    assert abs(counted) > 1e4
    assert counted == pytest.approx(analyzed, rel=0.15)


def test_scores_count_their_products():
    """Width 128, 4 heads of 32; a query has 32.5 keys on average."""
    plain = WIDE.token_flops(VOCAB, LENGTH)

    def added(*score):
        flops = replace(WIDE, pattern=(Causal(score=score),)).token_flops(VOCAB, LENGTH)
        return flops.weights - plain.weights, flops.attention - 4 * 128 * 32.5

    assert added(scores.ALiBi(), scores.Softcap()) == (0, 0)
    assert added(scores.CoPE(64)) == (2 * 128 * 64, 2 * 128 * 32.5)  # the gates are products of all heads
    assert added(scores.FoX(), scores.Selective()) == (2 * 128 * 4, 2 * 32 * 32.5)


def brute_force(kind, length):
    i, j = np.mgrid[:length, :length]
    if isinstance(kind, Bidirectional):
        return (abs(i - j) <= (length if kind.left is None else kind.left)).sum()
    return ((j <= i) & (j > i - (kind.window if isinstance(kind, Sliding) else length))).sum()


@pytest.mark.parametrize("kind", [Causal(), Sliding(window=1), Sliding(window=5), Sliding(window=99), Bidirectional(), Bidirectional(left=3, right=3)], ids=repr)  # fmt: skip
def test_token_flops_counts_allowed_pairs_of_the_mask(kind):
    config = DecoderConfig(depth=3, width=32, attention=AttentionConfig(heads=2), pattern=(kind,))
    expected = 3 * 4 * 32 * brute_force(kind, 20) / 20
    assert config.token_flops(VOCAB, 20).attention == pytest.approx(expected)


def test_peak_flops_by_device_kind():
    class Device:
        def __init__(self, kind):
            self.platform, self.device_kind = "tpu", kind

    assert peak_flops(Device("TPU v5 lite")) == PEAK["TPU v5 lite"]  # the longest matching name, not "TPU v5"
    assert peak_flops(Device("TPU v5")) == PEAK["TPU v5"]
    assert peak_flops(Device("NVIDIA H100 80GB HBM3")) == PEAK["NVIDIA H100"]
    assert np.isnan(peak_flops(Device("TPU v99")))
    assert peak_flops(jax.devices("cpu")[0]) > 1e8
