import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attention
from attnlab.attention import causal, mask_fn, per_head, window
from attnlab.attention.masks.base import BlockGrid, DenseMask, Mask, as_mask
from tests.attention.definitions import CASES, B, H, S, T, whole
from tests.attention.inputs import allowed_pairs, masks

SQUARE = sorted(name for name in CASES if CASES[name]().queries == S)


@st.composite
def combined(draw, depth=2):
    """A mask made of others, and what the definitions of those say of every pair."""
    if not depth or draw(st.booleans()):
        name = draw(st.sampled_from(SQUARE))
        return CASES[name]().mask, whole(name)
    (left, pairs), (right, others) = draw(combined(depth - 1)), draw(combined(depth - 1))
    return draw(
        st.sampled_from(((left & right, pairs & others), (left | right, pairs | others), (~left, ~pairs)))
    )


@settings(max_examples=40, deadline=None)
@given(combined())
def test_combined_masks_allow_what_logic_says(drawn):
    mask, allowed = drawn
    got = mask.materialize(S, S, B, H)
    np.testing.assert_array_equal(np.broadcast_to(got, allowed.shape), allowed)


@settings(max_examples=15, deadline=None)
@given(combined(), st.sampled_from(((4, 5), (5, 3))))
def test_block_summary_of_combined_masks_is_a_bound_on_every_pair(drawn, block_sizes):
    mask, allowed = drawn
    any_allowed, all_allowed = jax.jit(lambda mask: mask.block_summary(BlockGrid(S, S, *block_sizes, B, H)))(
        mask
    )
    q_block, kv_block = (np.arange(S) // size for size in block_sizes)
    visited, unmasked = (
        np.broadcast_to(x, (B, H, *x.shape[2:]))[:, :, q_block][..., kv_block]
        for x in (any_allowed, all_allowed)
    )
    assert not (allowed & ~visited).any()
    assert not (unmasked & ~allowed).any()


@settings(max_examples=30, deadline=None)
@given(masks(B, T, S))
def test_the_oracle_of_other_tests_agrees(mask):
    got = jnp.broadcast_to(mask.materialize(T, S), (B, 1, T, S))[:, 0]
    np.testing.assert_array_equal(got, allowed_pairs(mask, B, T, S))


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_an_array_may_stand_for_a_mask_on_either_side(make):
    array = make(np.random.default_rng(0).random((4, 4)) < 0.5)
    triangle = np.tril(np.ones((4, 4), bool))
    for mask, expected in (
        (causal() & array, triangle & array),
        (array & causal(), triangle & array),
        (causal() | array, triangle | array),
        (array | causal(), triangle | array),
    ):
        np.testing.assert_array_equal(mask.materialize(4, 4)[0, 0], expected)


def test_an_array_of_fewer_dimensions_serves_all_rows_and_heads():
    array = np.random.default_rng(0).random((3, 4, 5)) < 0.5
    mask = as_mask(array)
    assert isinstance(mask, DenseMask)
    np.testing.assert_array_equal(mask.materialize(4, 5), array[None])
    np.testing.assert_array_equal(as_mask(array[0, :1]).materialize(4, 5)[0, 0], array[0, :1].repeat(4, 0))


def test_a_function_may_stand_for_a_mask():
    mask = causal() & (lambda b, h, q, k: k % 2 == 0)
    assert mask.draw(3, 5).splitlines() == ["x . . . .", "x . . . .", "x . x . ."]


def test_a_function_must_return_one_boolean(refuses):
    with refuses("one scalar", "int32[2]"):
        mask_fn(lambda b, h, q, k: jnp.array([q, k]))


def test_the_heads_of_a_device_have_masks_of_their_own():
    mask = per_head([causal(), window(0, 0), window(1, 1), causal()])
    assert len(mask.masks) == 3  # the two `causal()` are one
    any_allowed, all_allowed = mask.block_summary(BlockGrid(4, 4, 2, 2, heads=2, offset=(0, 1, 0, 0)))
    np.testing.assert_array_equal(any_allowed[0, 0], np.eye(2, dtype=bool))
    assert any_allowed[0, 1].all() and all_allowed[0, 1].trace() == 2 and not all_allowed[0, 0].any()


def test_density_counts_every_pair_in_strips():
    # So many pairs that they are counted in more than one strip.
    assert causal().density(3000, 3000) == pytest.approx(3000 * 3001 / 2 / 3000**2, abs=1e-12)
    assert (causal() & window(9, None)).density(3000, 3000) == pytest.approx(
        (3000 * 10 - 45) / 3000**2, abs=1e-12
    )


def test_draws_the_row_and_head_asked_for():
    def allows(b, h, q, k):
        return (k == b) | (k == 2 + h)

    assert mask_fn(allows).draw(2, 4) == "x . x .\nx . x ."
    assert mask_fn(allows).draw(1, 4, row=1, head=1) == ". x . x"
    assert as_mask(np.array([[True, False]])).draw(1, 2, row=3, head=1) == "x ."


def test_every_kind_of_mask_is_in_the_figure():
    public = {name: getattr(attention, name) for name in attention.__all__}
    makers = {name for name, x in public.items() if getattr(x, "__annotations__", {}).get("return") is Mask}
    of_anything = {"mask_fn", "shift_mask", "per_head"}
    tree = ast.parse((Path(__file__).parents[3] / "docs" / "figures" / "masks.py").read_text())
    drawn = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "causal" in makers and of_anything < makers
    assert makers - of_anything <= drawn
