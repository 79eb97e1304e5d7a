"""Block masks: their lists against the dense mask, and attention with lists per row and head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import bias, block_mask, causal, mask_fn, per_head, reference, segments, window
from attnlab.attention.backends.blockwise import blockwise
from attnlab.attention.backends.blockwise_autodiff import blockwise_autodiff
from attnlab.attention.block_mask import default_block_sizes, make_block_mask
from attnlab.attention.masks.base import BlockGrid
from tests.attention.inputs import SHAPES, allowed_pairs, masks, qkv, weighted_sum
from tests.selection import sample

B, T, H = 3, 29, 4


@pytest.fixture
def own_lists(monkeypatch):
    """Give each row and head lists of its own, also for small blocks, and loop over them."""
    monkeypatch.setattr(block_mask, "MIN_SCORES", 1)
    monkeypatch.setattr(block_mask, "FEW_BLOCKS", 0)


def documents(rows: int, length: int, count: int, seed: int = 0):
    """Return ids of `count` documents in each row, of other lengths in each row, (rows, length)."""
    rng = np.random.default_rng(seed)
    starts = [np.sort(rng.choice(np.arange(1, length), count - 1, replace=False)) for _ in range(rows)]
    return np.array([np.searchsorted(x, np.arange(length), side="right") + 1 for x in starts], np.int32)


def dense_blocks(allowed, block_q, block_kv):
    """Return which blocks of a mask (B, H, T, S) are partial, and which are full, by loops."""
    *_, t, s = allowed.shape
    count, width = -(-t // block_q), -(-s // block_kv)
    partial_, full = (np.zeros((*allowed.shape[:2], count, width), bool) for _ in range(2))
    for i in range(count):
        for j in range(width):
            block = allowed[:, :, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            # A kv block beyond the keys is padded, and padding needs the mask.
            full[:, :, i, j] = block.all((2, 3)) & ((j + 1) * block_kv <= s)
            partial_[:, :, i, j] = block.any((2, 3)) & ~full[:, :, i, j]
    return partial_, full


def as_dense(counts, indices, width):
    """Return lists of blocks as booleans, and check that they are in order."""
    dense = np.zeros((*np.shape(counts), width), bool)
    for at in np.ndindex(*np.shape(counts)):
        listed = np.asarray(indices)[at][: np.asarray(counts)[at]]
        assert (np.diff(listed) > 0).all()
        dense[at][listed] = True
    return dense


def assert_lists(made, partial_, full, exact=True):
    count, width = partial_.shape[2:]
    lists = {
        "kv": (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices, width),
        "q": (made.q_num_blocks, made.q_indices, made.full_q_num_blocks, made.full_q_indices, count),
    }
    found = {}
    for name, (num, indices, full_num, full_indices, length) in lists.items():
        found[name] = as_dense(num, indices, length), as_dense(full_num, full_indices, length)
    for rows, columns, whole in zip(found["kv"], found["q"], made.to_dense(), strict=True):
        np.testing.assert_array_equal(rows, columns.swapaxes(-1, -2))
        np.testing.assert_array_equal(rows, whole)
    got_partial, got_full = (np.broadcast_to(x, partial_.shape) for x in found["kv"])
    if exact:
        np.testing.assert_array_equal(got_full, full)
        np.testing.assert_array_equal(got_partial, partial_)
    else:  # bounds may call an empty block, or a full one, partial
        assert not (got_full & ~full).any() and not ((full | partial_) & ~(got_full | got_partial)).any()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_lists_equal_the_dense_blocks(data):
    shape = data.draw(st.sampled_from(SHAPES))
    b, t, s = shape["b"], shape["t"], shape["s"]
    mask = data.draw(masks(b, t, s))
    grid = BlockGrid(t, s, *data.draw(st.sampled_from([(2, 3), (4, 2), (1, 1)])), b, 2)
    allowed = np.broadcast_to(allowed_pairs(mask, b, t, s)[:, None], (b, 2, t, s))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_mask, "MIN_SCORES", 1)
        patch.setattr(block_mask, "FEW_BLOCKS", 0)
        made = make_block_mask(mask, grid)
    partial_, full = dense_blocks(allowed, grid.block_q, grid.block_kv)
    assert_lists(made, partial_, full, exact=False)


PER_HEAD = per_head([causal(), window(3), causal(-5), window(2, 2)])
IDS = documents(B, T, 4)
MASKS = {
    "rows": (causal() & segments(jnp.asarray(IDS)), (B, 1)),
    "heads": (PER_HEAD, (1, H)),
    "rows and heads": (PER_HEAD & segments(jnp.asarray(IDS)), (B, H)),
    "a function": (mask_fn(lambda b, h, q, k: (q >= k) & (q - k < 5 * (b + 1) + h)), (B, H)),
    "a band": (causal() & window(4) & segments(jnp.asarray(IDS)), (B, 1)),
    "the same in all": (causal() & segments(jnp.asarray(IDS[:1].repeat(B, 0))), (1, 1)),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_lists_of_each_row_and_head(own_lists, name, traced):
    (mask, shape), grid = MASKS[name], BlockGrid(T, T, 4, 3, B, H)
    if traced and name == "the same in all":
        shape = (B, 1)  # known to be the same only at run time
    made = jax.jit(lambda mask: make_block_mask(mask, grid))(mask) if traced else make_block_mask(mask, grid)
    assert made.kv_num_blocks.shape[:2] == made.q_num_blocks.shape[:2] == shape
    allowed = np.broadcast_to(mask.materialize(T, T, B, H), (B, H, T, T))
    # The bounds of a conjunction may call an empty block partial.
    assert_lists(made, *dense_blocks(allowed, 4, 3), exact=name in ("heads", "a function"))


@pytest.mark.parametrize("name", sample([*MASKS, "unequal lengths"], every=2))
@pytest.mark.parametrize("attention", [blockwise, blockwise_autodiff], ids=lambda f: f.__name__)
def test_results_equal_those_of_reference(own_lists, attention, name):
    t = 17 if name == "unequal lengths" else T
    mask = segments(jnp.asarray(IDS[:, :t]), jnp.asarray(IDS)) if t < T else MASKS[name][0]
    score = bias(jnp.asarray(np.random.default_rng(1).normal(size=(B, H, t, T)), jnp.float32))

    @partial(jax.jit, static_argnums=0)
    def run(function, mask, score, *arrays):
        def loss(query, key, value, score):
            return weighted_sum(*function(query, key, value, mask=mask, score=score)[:2])

        return jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays, score)

    arrays = qkv(0, b=B, t=t, s=T, h=H, k=2)
    got = run(partial(attention, block_sizes=(4, 8)), mask, score, *arrays)
    expected = run(reference, mask, score, *arrays)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)


def test_packed_rows_visit_little_more_than_their_own_blocks():
    """16 documents of other lengths in each of 8 rows: each row visits its own blocks only."""
    rows, length = 8, 4096
    ids = documents(rows, length, 16)

    @jax.jit
    def make(ids):
        mask = causal() & segments(ids)
        grid = BlockGrid(length, length, *default_block_sizes(length, length, mask), rows, 8)
        return make_block_mask(mask, grid)

    made = make(ids)
    q, k = np.arange(length)[:, None], np.arange(length)
    own = [dense_blocks(((x[:, None] == x) & (q >= k))[None, None], *made.block_sizes) for x in ids]
    own_count = sum(int(x.sum()) for blocks in own for x in blocks)
    assert own_count <= made.num_visits <= 1.3 * own_count
    union = make_block_mask(causal(), BlockGrid(length, length, *made.block_sizes))
    assert made.num_visits < 0.3 * rows * union.num_visits


def test_small_blocks_share_their_lists():
    ids = jnp.asarray(documents(B, 512, 4))
    for heads, shape in ((1, (1, 1)), (16, (B, 1))):
        grid = BlockGrid(512, 512, 64, 64, B, heads)
        made = jax.eval_shape(partial(_of_segments, grid), ids)
        assert made.kv_num_blocks.shape[:2] == shape


def _of_segments(grid, ids):
    return make_block_mask(segments(ids), grid)
