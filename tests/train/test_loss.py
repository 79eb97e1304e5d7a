"""The loss against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers.loss_terms import LossTerms, token_loss_terms
from attnlab.train.loss import Loss, token_sums

B, T, E, V = 2, 5, 8, 11


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x, table = 3 * rng.normal(size=(B, T, E)), rng.normal(size=(V, E))
    return x, table, rng.integers(0, V, (B, T)), (rng.random((B, T)) < 0.7) * rng.random((B, T))


def oracle(problem, label_smoothing, z_loss):
    """Compute cross-entropy with an explicit smoothed distribution, and the squared log-sum-exp."""
    x, table, targets, weights = problem
    logits = x @ table.T
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    log_p = logits - lse[..., None]
    target_p = (1 - label_smoothing) * np.eye(V)[targets] + label_smoothing / V
    return (weights * (-(target_p * log_p).sum(-1) + z_loss * lse**2)).sum()


def loss_terms(problem) -> LossTerms:
    x, table, targets, _ = problem
    return token_loss_terms(jnp.float32(x), jnp.int32(targets), jnp.float32(table), None, None, "float32")


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.1)])
def test_loss_equals_oracle(problem, label_smoothing, z_loss):
    loss = Loss(label_smoothing=label_smoothing, z_loss=z_loss)(loss_terms(problem), jnp.float32(problem[3]))
    assert float(loss) == pytest.approx(oracle(problem, label_smoothing, z_loss), rel=1e-5)


def test_token_sums_use_plain_cross_entropy(problem):
    x, table, targets, weights = problem
    sums = token_sums(loss_terms(problem), jnp.float32(weights))
    assert float(sums["nats"]) == pytest.approx(oracle(problem, 0, 0), rel=1e-5)
    correct = (x @ table.T).argmax(-1) == targets
    assert float(sums["correct"]) == pytest.approx((weights * correct).sum(), rel=1e-6)


@pytest.mark.parametrize("fields", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_loss_rejects_values_out_of_range(fields):
    with pytest.raises(ValueError, match="label_smoothing must be at least 0"):
        Loss(**fields)
