import jax.numpy as jnp
import numpy as np

from attnlab.attention.mixers import gated_delta_rule


def test_delta_rule_with_beta_one_stores_last_value():
    key = jnp.broadcast_to(jnp.eye(4)[jnp.array([0, 1, 0, 2, 0])][None, :, None, :], (1, 5, 1, 4))
    value = jnp.arange(10.0).reshape(1, 5, 1, 2)
    ones = jnp.ones((1, 5, 1))
    _, state = gated_delta_rule(key, key, value, 0 * ones, ones)
    np.testing.assert_allclose(state[0, 0], [[8, 9], [2, 3], [6, 7], [0, 0]], atol=1e-6)
