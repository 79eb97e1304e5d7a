import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import AttentionConfig, LayerNormConfig, MLPConfig
from attnlab.layers.attention import Documents, EncoderOutput
from attnlab.layers.linear import Dtypes
from attnlab.layers.pooling import ClassAndMean, ClassToken, Distilled, Mean, Pool, Probe, pooled_width

X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
PREFIX = 2
MEAN = np.stack([X[0, 2:].mean(0), X[1, 2:4].mean(0)])
EXPECTED = {
    ClassToken(): X[:, 0],
    Mean(): MEAN,
    ClassAndMean(): np.concatenate([X[:, 0], MEAN], axis=-1),
    Distilled(): np.concatenate([X[:, 0], X[:, 1]], axis=-1) / 2,
}


def pool(kind, x, segments=SEGMENTS):
    module = Pool(
        kind, PREFIX, AttentionConfig(2, bias=True), MLPConfig(12), LayerNormConfig(), 0.5, Dtypes()
    )
    tokens = EncoderOutput(jnp.asarray(x), Documents(jnp.asarray(segments)))
    return module.init_with_output(jax.random.key(0), tokens)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: type(kind).__name__)
def test_pooling_matches_definition(kind):
    got, params = pool(kind, X)
    np.testing.assert_allclose(got[:, 0], EXPECTED[kind], rtol=1e-6)
    assert got.shape == (2, 1, pooled_width(kind, 8)) and not params


def test_class_token_with_dense_layer():
    got, params = pool(ClassToken(dense=True), X)
    dense = params["params"]["dense"]
    np.testing.assert_allclose(got[:, 0], np.tanh(X[:, 0] @ dense["kernel"] + dense["bias"][None]), rtol=1e-5)


def test_probe_ignores_order_and_padding():
    got, _ = pool(Probe(), X)
    assert got.shape == (2, 1, 8)
    reversed_order, _ = pool(Probe(), X[:, ::-1], SEGMENTS[:, ::-1])
    np.testing.assert_allclose(reversed_order, got, rtol=1e-5, atol=1e-6)
    changed, _ = pool(Probe(), X + np.where(SEGMENTS == 0, 5.0, 0.0)[..., None].astype(np.float32))
    np.testing.assert_array_equal(changed, got)


def test_mean_in_bfloat16_counts_exactly():
    x = np.random.default_rng(0).normal(1, 1, (1, PREFIX + 729, 8)).astype(jnp.bfloat16)
    got, _ = pool(Mean(), x, np.ones((1, PREFIX + 729), np.int32))
    expected = x[:, PREFIX:].astype(np.float64).mean(axis=1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[:, 0], expected.astype(jnp.bfloat16))
