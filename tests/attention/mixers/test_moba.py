from functools import partial

import jax
import numpy as np
import pytest

from attnlab.attention import attend, causal
from attnlab.attention.mixers import moba
from tests.attention.mixers.block_inputs import (
    DV,
    KEY,
    QUERY,
    SIZE,
    VALUE,
    B,
    H,
    K,
    T,
    attention_of_query,
    check_gradients,
    normal,
)


def moba_loop(query, key, value, top):
    out, chosen = np.zeros((B, T, H, DV)), {}
    for row, i, h in np.ndindex(B, T, H):
        own, n = i // SIZE, h // (H // K)
        means = [key[row, m * SIZE : (m + 1) * SIZE, n].mean(0) for m in range(own)]
        best = sorted(range(own), key=lambda m: -(query[row, i, h] @ means[m]))[: top - 1]
        chosen[row, i, h] = {own, *best}
        attended = [j for j in range(i + 1) if j // SIZE in chosen[row, i, h]]
        out[row, i, h] = attention_of_query(query[row, i, h], key[row, attended, n], value[row, attended, n])
    return out


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_moba_agrees_with_a_loop(backend):
    arguments = normal(0, QUERY, KEY, VALUE)
    run = partial(moba, size=SIZE, top=3, backend=backend)
    expected = moba_loop(*(np.asarray(x, np.float64) for x in arguments), top=3)
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)


def test_moba_gradients_match_finite_differences():
    check_gradients(partial(moba, size=SIZE, top=3), partial(moba_loop, top=3), normal(1, QUERY, KEY, VALUE))


def test_moba_with_all_blocks_matches_causal_attention():
    arguments = normal(2, QUERY, KEY, VALUE)
    actual = jax.jit(partial(moba, size=SIZE, top=50))(*arguments)
    desired = jax.jit(partial(attend, mask=causal()))(*arguments)
    np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)
