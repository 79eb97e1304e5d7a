"""Shapes, random inputs and checks shared by the tests of MoBA and native sparse attention."""

import jax
import jax.numpy as jnp
import numpy as np

B, T, H, K, D, DV, SIZE = 2, 22, 4, 2, 5, 3, 4
N = T // SIZE
QUERY, KEY, VALUE = (B, T, H, D), (B, T, K, D), (B, T, K, DV)
NSA = QUERY, KEY, VALUE, (B, N, K, D), (B, N, K, DV), (B, T, H, 3)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def attention_of_query(query, keys, values):
    """Return the attention output of one query."""
    return softmax(keys @ query / np.sqrt(D)) @ values


def check_gradients(function, oracle, arguments):
    """Check the gradient of each argument against finite differences of `oracle`.

    The gradients are compared along one random direction per argument.
    """
    arguments = [np.asarray(x, np.float64) for x in arguments]
    weight, *along = (
        np.asarray(x, np.float64) for x in normal(9, (B, T, H, DV), *(x.shape for x in arguments))
    )
    loss = jax.grad(lambda *xs: (function(*xs) * weight).sum(), tuple(range(len(arguments))))
    gradients = jax.jit(loss)(*(jnp.asarray(x, jnp.float32) for x in arguments))
    for i, (gradient, direction) in enumerate(zip(gradients, along, strict=True)):
        high, low = (
            oracle(*(x + d * direction if i == j else x for j, x in enumerate(arguments)))
            for d in (1e-6, -1e-6)
        )
        slope = ((high - low) * weight).sum() / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-3)
