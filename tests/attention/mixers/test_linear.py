import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention import attend, causal, segments
from attnlab.attention.mixers import linear_attention
from tests.attention.mixers.test_recurrence import SEGMENTS, arguments


def test_linear_attention_matches_attend_with_kernel_score():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in arguments("linear"))
    documents = jnp.asarray(SEGMENTS)

    @jax.jit
    def both(query, key, value):
        actual, _ = linear_attention(query, key, value, feature=jnp.exp, segments=documents, chunk=4)
        mask, score = causal() & segments(documents), lambda s, b, h, q, k: jnp.log(s)
        return actual, attend(jnp.exp(query), jnp.exp(key), value, mask=mask, scale=1.0, score=score)

    actual, desired = both(query, key, value)
    np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)
