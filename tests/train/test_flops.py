"""FLOPs computed from the config against XLA's cost analysis of the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import AttentionConfig, Bidirectional, Causal, GatedMLPConfig, MLPConfig, Sliding
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
