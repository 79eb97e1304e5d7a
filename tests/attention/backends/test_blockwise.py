"""Blockwise attention against the reference: outputs, gradients, visited blocks and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import bias, block_mask, causal, mask_fn, reference, score_fn, segments, window
from attnlab.attention.attend import make_dropout
from attnlab.attention.backends.blockwise import Blocks, blockwise
from attnlab.attention.backends.blockwise_autodiff import blockwise_autodiff
from attnlab.attention.block_mask import default_block_sizes, make_block_mask
from attnlab.attention.masks.base import BlockGrid, DenseMask
from tests.attention.inputs import qkv, weighted_sum
from tests.selection import long, sample


def loss_of(attention, scale=0.4, **options):
    def loss(query, key, value, mask, score):
        out, lse, *_ = attention(query, key, value, mask=mask, score=score, scale=scale, **options)
        return weighted_sum(out, lse), (out, lse)

    return jax.value_and_grad(loss, (0, 1, 2, 4), has_aux=True)


def assert_agree(query, key, value, mask, score=None, tolerance=1e-5, block_sizes=None):
    @jax.jit
    def both(*args):
        return [loss_of(blockwise, block_sizes=block_sizes)(*args), loss_of(reference)(*args)]

    ((_, (out, lse)), gradients), ((_, (out_r, lse_r)), gradients_r) = both(query, key, value, mask, score)
    assert out.dtype == value.dtype and lse.dtype == jnp.float32
    pairs = zip(
        *(jax.tree.leaves(x) for x in ((out, lse, gradients), (out_r, lse_r, gradients_r))), strict=True
    )
    for actual, desired in pairs:
        actual, desired = np.asarray(actual, np.float32), np.asarray(desired, np.float32)
        finite = desired[np.isfinite(desired)]
        size = max(1.0, np.abs(finite).max(initial=0))
        np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance * size)


SAME = jnp.arange(150)[None]
LONG = {
    "none": None,
    "causal": causal(),
    "causal offset": causal(30),
    "window": causal() & window(20, None),
    "both sides": window(9, 40, 3),
    "segments": causal() & segments(SAME // 37),
    "rows without keys": causal(-70) & ~window(3, 3),
    "or": window(0, 0) | (causal() & segments(SAME % 3)),
    "differs by head": mask_fn(lambda b, h, q, k: (q >= k) & ((h == 0) | (q - k < 10))),
    "captured": mask_fn(lambda b, h, q, k: SAME[0, q] // 20 == SAME[0, k] // 20),
}


@pytest.mark.parametrize(
    "block_sizes", [None, (32, 64), (8, 8)], ids=["default blocks", "few blocks", "many blocks"]
)
@pytest.mark.parametrize("name", sample(LONG, every=3))
def test_blockwise_matches_reference_at_every_block_size(name, block_sizes):
    assert_agree(*qkv(1, b=1, t=150, s=150, h=2, k=1, d=4, dv=5), LONG[name], block_sizes=block_sizes)


@pytest.mark.parametrize(
    "limit, heads", [(64, 1), (255, 3), (384, 6), long(128, 1), long(63, 6), long(None, 6)]
)
def test_steps_of_one_row_have_few_heads(limit, heads, monkeypatch):
    """Blocks are 8 x 8, and each key head has 3 query heads."""
    monkeypatch.setattr(block_mask, "MIN_SCORES", 8 * 8 * 6)  # rows have lists of their own
    query, key, value = qkv(3, b=2, t=30, s=30, h=6, k=2)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, 30))))
    by_head = mask_fn(lambda b, h, q, k: (h % 2 == 0) | (q - k < 10))
    slopes = jnp.linspace(0.1, 0.6, 6)

    def gradients(attention, **options):
        def loss(query, key, value, slopes, ids):
            score = score_fn(lambda s, b, h, q, k: s - slopes[h] * (q - k))
            dropout = make_dropout(0.3, jax.random.key(0), None, False, False)
            mask = causal() & segments(ids) & by_head
            out, lse, *_ = attention(query, key, value, mask=mask, score=score, dropout=dropout, **options)
            return weighted_sum(out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(query, key, value, slopes, ids)

    got = gradients(blockwise, block_sizes=(8, 8), max_step_scores=limit)
    for actual, desired in zip(got, gradients(reference), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)

    def shapes(ids):
        made = make_block_mask(segments(ids), BlockGrid(30, 30, 8, 8, 2, 6))
        blocks = Blocks((1.0, True, limit), (2, 2, 3, 32, 6), None, None, None, made, (0, 0, 0, 0))
        seen.append((np.prod(blocks.step_shape), blocks.num_steps))

    seen = []
    jax.eval_shape(shapes, ids)
    assert seen == [(heads, (2, 6 // heads))]


@pytest.mark.parametrize("length", [16, 64])
def test_bfloat16_gradients_of_one_block(length):
    """Nothing is added to products of one block, so XLA can merge them with a transpose."""
    arrays = qkv(1, b=2, t=length, s=length, d=8, dv=4, dtype=jnp.bfloat16)

    def gradients(attention):
        def loss(*arrays):
            return jnp.sum(attention(*arrays, mask=causal())[0].astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    for got, expected in zip(gradients(blockwise), gradients(reference), strict=True):
        got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["none", "window", "segments"])
def test_bfloat16_error_is_at_most_two_roundings(name):
    # The reference rounds once, at the end. `blockwise` also rounds weights and score gradients
    # (2^-8 each).
    query, key, value = (x / 2 for x in qkv(1, b=1, t=150, s=150, h=2, k=1, d=4, dv=5, dtype=jnp.bfloat16))
    assert_agree(query, key, value, LONG[name], tolerance=2**-7)


@pytest.mark.parametrize("block_sizes", [(16, 8), (4, 4)], ids=["few blocks", "many blocks"])
@pytest.mark.parametrize(
    "shape", [(2, 4, 29, 23), (1, 4, 29, 23), (2, 1, 1, 23), (1, 1, 29, 1), (1, 1, 1, 1)], ids=str
)
def test_bias_of_any_shape_has_gradients(shape, block_sizes):
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert_agree(*qkv(2, t=29, s=23), causal(-3), bias(array), block_sizes=block_sizes)


def test_captured_arrays_have_gradients():
    slopes, table = jnp.linspace(0.1, 0.4, 4), jnp.linspace(-1, 1, 60)
    query, key, value = qkv(2, t=29, s=29)

    def gradients(attention, **options):
        def loss(slopes, table):
            score = score_fn(lambda s, b, h, q, k: jnp.tanh(s) - slopes[h] * (q - k) + table[q - k + 29])
            mask = mask_fn(lambda b, h, q, k: q >= k)
            return weighted_sum(*attention(query, key, value, mask=mask, score=score, **options)[:2])

        return jax.jit(jax.grad(loss, (0, 1)))(slopes, table)

    expected = gradients(reference)
    for actual, desired in zip(gradients(blockwise, block_sizes=(8, 8)), expected, strict=True):
        assert np.abs(desired).max() > 0.1
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [reference, blockwise, blockwise_autodiff], ids=lambda f: f.__name__)
def test_nan_scores_of_masked_pairs_do_not_affect_gradients(attention):
    def loss(logarithm, query, key, value):
        score = score_fn(lambda s, b, h, q, k: s * logarithm(q - k + 1.0))
        return weighted_sum(*attention(query, key, value, mask=causal(), score=score)[:2])

    def gradients(logarithm):
        return jax.jit(jax.grad(lambda *x: loss(logarithm, *x), (0, 1, 2)))(*qkv(2, t=29, s=29))

    expected = gradients(lambda x: jnp.log(jnp.maximum(x, 1)))
    for actual, desired in zip(gradients(jnp.log), expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [reference, blockwise, blockwise_autodiff], ids=lambda f: f.__name__)
@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min])
def test_bias_of_minus_infinity_equals_mask(attention, low):
    allowed = np.random.default_rng(0).random((1, 1, 29, 23)) < 0.5
    allowed[..., 4, :] = False
    array = jnp.asarray(np.where(allowed, 0, low), jnp.float32)
    arrays = qkv(2, t=29, s=23)
    got = jax.jit(lambda *x: attention(*x, score=bias(array)))(*arrays)[:2]
    for actual, desired in zip(got, reference(*arrays, mask=DenseMask(allowed)), strict=False):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


def test_vmap_over_masks():
    examples = [qkv(seed, t=9, s=9) for seed in range(3)]
    ids = jnp.array([[[1] * 9] * 2, [[1] * 4 + [2] * 5] * 2, [[0] * 3 + [1] * 6] * 2])
    stacked = [jnp.stack(x) for x in zip(*examples, strict=True)]

    def run(attention, **options):
        return lambda q, k, v, ids: loss_of(attention, **options)(q, k, v, causal() & segments(ids), None)

    got = jax.vmap(run(blockwise, block_sizes=(4, 4)))(*stacked, ids)
    expected = jax.vmap(run(reference))(*stacked, ids)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["rows without keys", "differs by head"])
def test_forward_mode_and_second_derivatives(name):
    query, key, value = qkv(3, b=1, t=30, s=30, h=2, k=1, d=4, dv=3)
    slope, tangents = jnp.float32(0.3), qkv(4, b=1, t=30, s=30, h=2, k=1, d=4, dv=3)

    def derivatives(attention, **options):
        def loss(query, key, value, slope):
            score = score_fn(lambda s, b, h, q, k: jnp.tanh(s) - slope * (q - k))
            out, lse, *_ = attention(query, key, value, mask=LONG[name], score=score, scale=0.4, **options)
            return weighted_sum(out, lse)

        def along(*arrays):
            return jax.jvp(loss, arrays, (*tangents, jnp.float32(1)))[1]

        # Forward mode, forward over reverse and reverse over forward.
        arrays = query, key, value, slope
        twice = jax.jvp(jax.grad(loss, (0, 1, 2, 3)), arrays, (*tangents, jnp.float32(1)))
        return along(*arrays), twice, jax.grad(along, (0, 1, 2, 3))(*arrays)

    got = jax.jit(lambda: derivatives(blockwise_autodiff, block_sizes=(8, 8)))()
    expected = jax.jit(lambda: derivatives(reference))()
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        size = max(1.0, np.abs(desired).max())
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("traced", [False, True])
def test_empty_blocks_are_never_read(traced):
    query, key, value = qkv(2, t=16, s=16)
    poison = jnp.where(jnp.arange(16)[None, :, None, None] >= 12, jnp.nan, 1.0)

    @jax.jit
    def run(offset):
        mask = causal(offset if traced else 0)
        return blockwise(query, key * poison, value * poison, mask=mask, block_sizes=(4, 4))

    out, lse = run(jnp.int32(0))
    assert jnp.isfinite(out[:, :12]).all() and jnp.isfinite(lse[:, :12]).all()
    assert jnp.isnan(out[:, 12:]).any()


def test_only_partial_blocks_are_masked():
    block_mask = make_block_mask(causal(), BlockGrid(64, 64, 8, 16))
    np.testing.assert_array_equal(block_mask.full_kv_num_blocks[0, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(block_mask.kv_num_blocks, 1)
    assert (block_mask.info.has_full, block_mask.info.has_partial) == (True, True)
    assert make_block_mask(None, BlockGrid(64, 64, 8, 16)).info.has_partial is False
    padded = BlockGrid(64, 60, 8, 16)  # the last block of keys is padded
    assert make_block_mask(None, padded).info.has_partial is True


def test_blocks_visited_at_4096_with_default_blocks():
    """Upper bounds on the fraction of visited blocks for causal masks, segments and windows."""

    def share(mask, length=4096):
        grid = BlockGrid(length, length, *default_block_sizes(length, length))
        block_mask = make_block_mask(mask, grid)
        return block_mask.num_visits / np.prod(grid.num_blocks)

    documents = segments(jnp.arange(4096)[None] // 512 + 1)
    sliding = causal() & window(511)
    assert share(None) == 1
    assert share(causal()) < 0.6
    assert share(causal() & documents) < 0.2
    assert share(sliding, 16384) < 1.1 / 4 * share(sliding)


def test_blocks_on_a_gpu_are_few_and_bounded():
    """Each visited block is ten kernel launches; the scores of a block take at most 256 MiB."""
    grid = BlockGrid(4096, 4096, *default_block_sizes(4096, 4096, None, "gpu", rows=16))
    assert int(make_block_mask(causal(), grid).num_visits) == 10
    assert default_block_sizes(1024, 8192, None, "gpu", rows=8 * 16) == (512, 512)
    assert default_block_sizes(8192, 8192, None, "gpu", rows=2**16) == (256, 256)


def test_static_part_of_a_mask_is_used_if_the_rest_is_traced():
    grid = BlockGrid(64, 64, 16, 16, batch=2, heads=4)
    unrolled = []

    @jax.jit
    def run(ids, row):
        for mask, offset in (
            (causal() & segments(ids), (0, 0, 0, 0)),
            (causal(), (row, row, 0, 0)),  # on a device whose batch rows are traced
            (mask_fn(lambda b, h, q, k: q >= k + b), (row, row, 0, 0)),
            (causal(row) & causal(), (0, 0, 0, 0)),
            (DenseMask(np.ones((1, 4, 1, 1), bool)) | (lambda b, h, q, k: q >= k + h), (row, row, 0, 0)),
        ):
            unrolled.append(make_block_mask(mask, grid._replace(offset=offset)).info.unrolled)
        return ids

    run(jnp.ones((2, 64), jnp.int32), 0)
    diagonal = tuple(tuple((j, j == i) for j in range(i + 1)) for i in range(4))
    masked = tuple(tuple((j, True) for j in range(i + 1)) for i in range(4))
    assert unrolled == [masked, diagonal, None, masked, None]


@pytest.mark.parametrize("mask", [causal(), causal() & window(511)], ids=["causal", "window"])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_length(backward, mask):
    def peak(attention, length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

        def out(q, k, v):
            return attention(q, k, v, mask=mask)[0]

        f = jax.grad(lambda *a: out(*a).sum(), (0, 1, 2)) if backward else out
        return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    full = peak(reference, 8192)
    assert full >= 8192 * 8192 * 4
    short, long = peak(blockwise, 2048), peak(blockwise, 8192)
    assert long < 4.5 * short
    assert long < full / 10
