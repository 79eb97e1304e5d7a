from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, causal
from attnlab.attention.masks.base import BlockGrid, Mask
from attnlab.attention.mixers.native_sparse import Chosen, Past, block_means, moba, nsa

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


def over(query, keys, values):
    """Attention of one query to some keys."""
    return softmax(keys @ query / np.sqrt(D)) @ values


def moba_loop(query, key, value, top):
    out, chosen = np.zeros((B, T, H, DV)), {}
    for row, i, h in np.ndindex(B, T, H):
        own, n = i // SIZE, h // (H // K)
        means = [key[row, m * SIZE : (m + 1) * SIZE, n].mean(0) for m in range(own)]
        best = sorted(range(own), key=lambda m: -(query[row, i, h] @ means[m]))[: top - 1]
        chosen[row, i, h] = {own, *best}
        seen = [j for j in range(i + 1) if j // SIZE in chosen[row, i, h]]
        out[row, i, h] = over(query[row, i, h], key[row, seen, n], value[row, seen, n])
    return out


def nsa_loop(query, key, value, coarse_key, coarse_value, gates, top, left):
    out = np.zeros((B, T, H, DV))
    for row, i, n in np.ndindex(B, T, K):
        heads = range(n * (H // K), (n + 1) * (H // K))
        past = [m for m in range(N) if (m + 1) * SIZE <= i + 1]  # blocks whose last token is seen
        importance = dict.fromkeys(range(i // SIZE + 1), 0.0)
        for h in heads if past else ():
            weights = softmax(coarse_key[row, past, n] @ query[row, i, h] / np.sqrt(D))
            out[row, i, h] += gates[row, i, h, 0] * (weights @ coarse_value[row, past, n])
            for m, weight in zip(past, weights, strict=True):
                importance[m] += weight
        fixed = {m for m in (0, i // SIZE - 1, i // SIZE) if m >= 0}
        free = sorted(set(importance) - fixed, key=lambda m: -importance[m])
        chosen = fixed | set(free[: top - len(fixed)])
        seen = [j for j in range(i + 1) if j // SIZE in chosen]
        near = list(range(max(0, i - left), i + 1))
        for h in heads:
            for gate, keys in ((1, seen), (2, near)):
                attended = over(query[row, i, h], key[row, keys, n], value[row, keys, n])
                out[row, i, h] += gates[row, i, h, gate] * attended
    return out


def check_gradients(function, oracle, arguments):
    """A random derivative of `function` against the slope of the oracle, for each argument alone."""
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


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_moba_agrees_with_a_loop(backend):
    arguments = normal(0, QUERY, KEY, VALUE)
    run = partial(moba, size=SIZE, top=3, backend=backend)
    expected = moba_loop(*(np.asarray(x, np.float64) for x in arguments), top=3)
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)


def test_moba_has_the_gradient_of_its_choice():
    check_gradients(partial(moba, size=SIZE, top=3), partial(moba_loop, top=3), normal(1, QUERY, KEY, VALUE))


def test_moba_of_all_blocks_is_causal_attention():
    arguments = normal(2, QUERY, KEY, VALUE)
    ours = jax.jit(partial(moba, size=SIZE, top=50))(*arguments)
    theirs = jax.jit(partial(attend, mask=causal()))(*arguments)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_nsa_agrees_with_a_loop(backend):
    arguments = normal(3, *NSA)
    run = partial(nsa, size=SIZE, top=4, left=5, backend=backend)
    expected = nsa_loop(*(np.asarray(x, np.float64) for x in arguments), top=4, left=5)
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)


def test_nsa_has_the_gradient_of_its_choice():
    check_gradients(partial(nsa, size=SIZE, top=4, left=5), partial(nsa_loop, top=4, left=5), normal(4, *NSA))


def test_no_query_looks_ahead():
    """What comes after a query changes nothing of it, through the choice of blocks or otherwise."""
    query, key, value, gates = normal(5, QUERY, KEY, VALUE, (B, T, H, 3))

    @jax.jit
    def run(query, key, value):
        coarse = block_means(key, SIZE), block_means(value, SIZE)
        fine = nsa(query, key, value, *coarse, gates, size=SIZE, top=3, left=2)
        return fine, moba(query, key, value, size=SIZE, top=2)

    whole = run(query, key, value)
    for cut in (6, 8, 15):
        for ours, theirs in zip(
            run(query, *(x.at[:, cut:].add(7) for x in (key, value))), whole, strict=True
        ):
            np.testing.assert_allclose(ours[:, :cut], theirs[:, :cut], rtol=1e-5, atol=1e-6)
            assert not np.allclose(ours[:, cut:], theirs[:, cut:], atol=0.1)


def test_rows_may_be_sharded(mesh_of):
    arguments = normal(6, *NSA)

    @jax.jit
    def run(*arguments):
        fine = nsa(*arguments, size=SIZE, top=3, left=2)
        return fine, moba(*arguments[:3], size=SIZE, top=2)

    with jax.set_mesh(mesh_of("data:2")):
        ours = run(*(jax.reshard(x, jax.P("data", None, None, None)) for x in arguments))
    for a, b in zip(ours, run(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def choices(seed, heads=2, share=0.5):
    return jnp.asarray(np.random.default_rng(seed).random((B, heads, T, -(-T // SIZE))) < share)


def test_a_key_is_allowed_where_its_block_is_chosen():
    chosen = choices(0)
    allowed = Chosen(chosen, SIZE).materialize(T, T, B, 2)
    for row, head, i, j in np.ndindex(B, 2, T, T):
        assert allowed[row, head, i, j] == chosen[row, head, i, j // SIZE]


def test_a_block_is_past_when_its_last_key_is():
    allowed = Past(SIZE).materialize(T, N)[0, 0]
    for i, n in np.ndindex(T, N):
        assert allowed[i, n] == (max(range(n * SIZE, (n + 1) * SIZE)) <= i)


@pytest.mark.parametrize("rows,columns", [(5, 3), (4, 4), (8, 10), (30, 30)])
def test_tiles_of_chosen_blocks_are_those_of_their_pairs(rows, columns):
    for share in (0.1, 0.9):
        mask = Chosen(choices(1, share=share), SIZE)
        grid = BlockGrid(T, T, rows, columns, B, 2)
        for ours, theirs in zip(mask.block_summary(grid), Mask.block_summary(mask, grid), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_tiles_count_keys_from_the_first():
    mask = Chosen(choices(2, share=0.3), SIZE)
    grid = BlockGrid(T, 8, 6, 3, B, 2, (0, 0, 0, 7))
    for ours, theirs in zip(mask.block_summary(grid), Mask.block_summary(mask, grid), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_refuses_what_does_not_fit(refuses):
    query, key, value, coarse_key, coarse_value, gates = normal(7, *NSA)
    with refuses("moba", "one sequence"):
        moba(query[:, :3], key, value, size=SIZE, top=2)
    with refuses("moba", "top at least 1"):
        moba(query, key, value, size=SIZE, top=0)
    with refuses("nsa", "top at least 3"):
        nsa(query, key, value, coarse_key, coarse_value, gates, size=SIZE, top=2, left=3)
    with refuses("nsa", "5 whole blocks of 4", "not 3"):
        nsa(query, key, value, coarse_key[:, :3], coarse_value[:, :3], gates, size=SIZE, top=3, left=3)
