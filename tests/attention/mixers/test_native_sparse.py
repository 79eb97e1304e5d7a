from functools import partial

import jax
import numpy as np
import pytest

from attnlab.attention.mixers import nsa
from attnlab.attention.mixers.native_sparse import CompletedBlocksMask
from tests.attention.mixers.block_inputs import (
    DV,
    NSA,
    SIZE,
    B,
    D,
    H,
    K,
    N,
    T,
    attention_of_query,
    check_gradients,
    normal,
    softmax,
)


def nsa_loop(query, key, value, coarse_key, coarse_value, gates, top, left):
    out = np.zeros((B, T, H, DV))
    for row, i, n in np.ndindex(B, T, K):
        heads = range(n * (H // K), (n + 1) * (H // K))
        past = [m for m in range(N) if (m + 1) * SIZE <= i + 1]  # blocks that end at or before i
        importance = dict.fromkeys(range(i // SIZE + 1), 0.0)
        for h in heads if past else ():
            weights = softmax(coarse_key[row, past, n] @ query[row, i, h] / np.sqrt(D))
            out[row, i, h] += gates[row, i, h, 0] * (weights @ coarse_value[row, past, n])
            for m, weight in zip(past, weights, strict=True):
                importance[m] += weight
        fixed = {m for m in (0, i // SIZE - 1, i // SIZE) if m >= 0}
        candidates = sorted(set(importance) - fixed, key=lambda m: -importance[m])
        chosen = fixed | set(candidates[: top - len(fixed)])
        attended_keys = [j for j in range(i + 1) if j // SIZE in chosen]
        window_keys = list(range(max(0, i - left), i + 1))
        for h in heads:
            for gate, keys in ((1, attended_keys), (2, window_keys)):
                attended = attention_of_query(query[row, i, h], key[row, keys, n], value[row, keys, n])
                out[row, i, h] += gates[row, i, h, gate] * attended
    return out


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_nsa_agrees_with_a_loop(backend):
    arguments = normal(3, *NSA)
    run = partial(nsa, size=SIZE, top=4, left=5, backend=backend)
    expected = nsa_loop(*(np.asarray(x, np.float64) for x in arguments), top=4, left=5)
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)


def test_nsa_gradients_match_finite_differences():
    check_gradients(partial(nsa, size=SIZE, top=4, left=5), partial(nsa_loop, top=4, left=5), normal(4, *NSA))


def test_completed_blocks_mask_requires_last_key_of_block():
    allowed = CompletedBlocksMask(SIZE).materialize(T, N)[0, 0]
    for i, n in np.ndindex(T, N):
        assert allowed[i, n] == (max(range(n * SIZE, (n + 1) * SIZE)) <= i)
