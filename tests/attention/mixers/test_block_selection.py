import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.masks.base import BlockGrid, Mask
from attnlab.attention.mixers import moba, nsa
from attnlab.attention.mixers.block_selection import SelectedBlocksMask, block_means
from tests.attention.mixers.block_inputs import KEY, NSA, QUERY, SIZE, VALUE, B, H, T, normal


def random_selection(seed, heads=2, share=0.5):
    return jnp.asarray(np.random.default_rng(seed).random((B, heads, T, -(-T // SIZE))) < share)


def test_selected_blocks_mask_allows_keys_of_selected_blocks():
    selected = random_selection(0)
    allowed = SelectedBlocksMask(selected, SIZE).materialize(T, T, B, 2)
    for row, head, i, j in np.ndindex(B, 2, T, T):
        assert allowed[row, head, i, j] == selected[row, head, i, j // SIZE]


@pytest.mark.parametrize("block_q,block_kv", [(5, 3), (4, 4), (8, 10), (30, 30)])
def test_block_summary_of_selected_blocks_matches_pair_counts(block_q, block_kv):
    for share in (0.1, 0.9):
        mask = SelectedBlocksMask(random_selection(1, share=share), SIZE)
        grid = BlockGrid(T, T, block_q, block_kv, B, 2)
        for actual, desired in zip(mask.block_summary(grid), Mask.block_summary(mask, grid), strict=True):
            np.testing.assert_array_equal(actual, desired)


def test_block_summary_with_key_offset():
    mask = SelectedBlocksMask(random_selection(2, share=0.3), SIZE)
    grid = BlockGrid(T, 8, 6, 3, B, 2, (0, 0, 0, 7))
    for actual, desired in zip(mask.block_summary(grid), Mask.block_summary(mask, grid), strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_block_selection_is_causal():
    """Later keys and values do not change a query's output, nor its selection of blocks."""
    query, key, value, gates = normal(5, QUERY, KEY, VALUE, (B, T, H, 3))

    @jax.jit
    def run(query, key, value):
        coarse = block_means(key, SIZE), block_means(value, SIZE)
        fine = nsa(query, key, value, *coarse, gates, size=SIZE, top=3, left=2)
        return fine, moba(query, key, value, size=SIZE, top=2)

    baseline = run(query, key, value)
    for cut in (6, 8, 15):
        for actual, desired in zip(
            run(query, *(x.at[:, cut:].add(7) for x in (key, value))), baseline, strict=True
        ):
            np.testing.assert_allclose(actual[:, :cut], desired[:, :cut], rtol=1e-5, atol=1e-6)
            assert not np.allclose(actual[:, cut:], desired[:, cut:], atol=0.1)


def test_sharded_rows(mesh_of):
    arguments = normal(6, *NSA)

    @jax.jit
    def run(*arguments):
        fine = nsa(*arguments, size=SIZE, top=3, left=2)
        return fine, moba(*arguments[:3], size=SIZE, top=2)

    with jax.set_mesh(mesh_of("data:2")):
        actual = run(*(jax.reshard(x, jax.P("data", None, None, None)) for x in arguments))
    for a, b in zip(actual, run(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rejects_invalid_arguments(refuses):
    query, key, value, coarse_key, coarse_value, gates = normal(7, *NSA)
    with refuses("moba", "same sequence"):
        moba(query[:, :3], key, value, size=SIZE, top=2)
    with refuses("moba", "top at least 1"):
        moba(query, key, value, size=SIZE, top=0)
    with refuses("nsa", "top at least 3"):
        nsa(query, key, value, coarse_key, coarse_value, gates, size=SIZE, top=2, left=3)
    with refuses("nsa", "5 whole blocks of 4", "coarse_key has 3"):
        nsa(query, key, value, coarse_key[:, :3], coarse_value[:, :3], gates, size=SIZE, top=3, left=3)
