import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import blockwise as module
from attnlab.attention import causal, reference, segments, softcap, window
from attnlab.attention.blockwise import blockwise
from tests.attention.inputs import SHAPES, masks, qkv, weighted_sum


@pytest.fixture
def small_blocks(monkeypatch):
    """Four query rows a block, so that short sequences have several."""
    monkeypatch.setattr(module, "MIN_BLOCK", 4)


def loss_of(attention, score=None, scale=0.4):
    def loss(query, key, value, mask):
        out, lse, *_ = attention(query, key, value, mask=mask, score=score, scale=scale)
        return weighted_sum(out, lse), (out, lse)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def assert_agree(query, key, value, mask, score=None, tolerance=1e-5, wrap=lambda f: f):
    (_, (out, lse)), gradients = wrap(loss_of(blockwise, score))(query, key, value, mask)
    (_, (out_r, lse_r)), gradients_r = loss_of(reference, score)(query, key, value, mask)
    assert out.dtype == value.dtype and lse.dtype == jnp.float32
    for ours, theirs in zip((out, lse, *gradients), (out_r, lse_r, *gradients_r), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        finite = theirs[np.isfinite(theirs)]
        size = max(1.0, np.abs(finite).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * size)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(SHAPES), st.none() | st.just(1.5))
def test_agrees_with_the_reference(data, shape, cap):
    mask = data.draw(st.none() | masks(shape["b"], shape["t"], shape["s"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_BLOCK", 4)
        assert_agree(*qkv(0, **shape), mask, None if cap is None else softcap(cap))


LONG = {
    "none": None,
    "causal": causal(),
    "causal offset": causal(30),
    "window": causal() & window(20, None),
    "both sides": window(9, 40, 3),
    "segments": causal() & segments(jnp.arange(150)[None] // 37),
    "rows without keys": causal(-70) & ~window(3, 3),
    "or": window(0, 0) | (causal() & segments(jnp.arange(150)[None] % 3)),
}


@pytest.mark.parametrize("name", LONG)
def test_agrees_at_its_own_block_size_under_jit(name):
    assert_agree(*qkv(1, b=1, t=150, s=150, h=2, k=1, d=4, dv=5), LONG[name], wrap=jax.jit)


@pytest.mark.parametrize("name", ["none", "window", "segments"])
def test_bfloat16_agrees_to_two_of_its_roundings(name):
    # The reference rounds once, at the end; here weights and score gradients are rounded too (2^-8 each).
    query, key, value = (x / 2 for x in qkv(1, b=1, t=150, s=150, h=2, k=1, d=4, dv=5, dtype=jnp.bfloat16))
    assert_agree(query, key, value, LONG[name], tolerance=2**-7)


def test_under_vmap_with_a_mask_of_each(small_blocks):
    examples = [qkv(seed, t=9, s=9) for seed in range(3)]
    ids = jnp.array([[[1] * 9] * 2, [[1] * 4 + [2] * 5] * 2, [[0] * 3 + [1] * 6] * 2])
    stacked = [jnp.stack(x) for x in zip(*examples, strict=True)]

    def run(attention):
        return lambda q, k, v, ids: loss_of(attention)(q, k, v, causal() & segments(ids))

    got = jax.vmap(run(blockwise))(*stacked, ids)
    for i, example in enumerate(examples):
        expected = run(reference)(*example, ids[i])
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-5, atol=2e-5)


def test_keys_out_of_reach_are_never_read(small_blocks):
    query, key, value = qkv(2, t=16, s=16)
    poison = jnp.where(jnp.arange(16)[None, :, None, None] >= 12, jnp.nan, 1.0)
    out, lse = blockwise(query, key * poison, value * poison, mask=causal(), score=None, scale=1.0)
    assert jnp.isfinite(out[:, :12]).all() and jnp.isfinite(lse[:, :12]).all()
    assert jnp.isnan(out[:, 12:]).any()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_length(backward):
    def peak(attention, length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

        def out(q, k, v):
            return attention(q, k, v, mask=causal() & window(255, None), score=None, scale=1.0)[0]

        f = jax.grad(lambda *a: out(*a).sum(), (0, 1, 2)) if backward else out
        return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    full = peak(reference, 4096)
    assert full >= 4096 * 4096 * 4
    short, long = peak(blockwise, 1024), peak(blockwise, 4096)
    # A block has 64 rows of 1024 and 256 of 4096: 16 times the scores at most, were all blocks held.
    assert long < 6 * short
    assert long < full / 8
