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
from tests.attention.definitions import CASES, B, H, S, T, expected_mask
from tests.attention.inputs import allowed_pairs, masks

SQUARE = sorted(name for name in CASES if CASES[name]().queries == S)


@st.composite
def combined(draw, depth=2):
    """Draw a mask combined from others, with its expected value at every pair."""
    if not depth or draw(st.booleans()):
        name = draw(st.sampled_from(SQUARE))
        return CASES[name]().mask, expected_mask(name)
    (left, left_pairs), (right, right_pairs) = draw(combined(depth - 1)), draw(combined(depth - 1))
    return draw(
        st.sampled_from(
            (
                (left & right, left_pairs & right_pairs),
                (left | right, left_pairs | right_pairs),
                (~left, ~left_pairs),
            )
        )
    )


@settings(max_examples=40, deadline=None)
@given(combined())
def test_combined_masks_match_boolean_logic(drawn):
    mask, allowed = drawn
    got = mask.materialize(S, S, B, H)
    np.testing.assert_array_equal(np.broadcast_to(got, allowed.shape), allowed)


@settings(max_examples=15, deadline=None)
@given(combined(), st.sampled_from(((4, 5), (5, 3))))
def test_block_summary_of_combined_masks_bounds_every_pair(drawn, block_sizes):
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
def test_allowed_pairs_oracle_matches_materialize(mask):
    got = jnp.broadcast_to(mask.materialize(T, S), (B, 1, T, S))[:, 0]
    np.testing.assert_array_equal(got, allowed_pairs(mask, B, T, S))


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_combine_mask_with_array_on_either_side(make):
    array = make(np.random.default_rng(0).random((4, 4)) < 0.5)
    triangle = np.tril(np.ones((4, 4), bool))
    for mask, expected in (
        (causal() & array, triangle & array),
        (array & causal(), triangle & array),
        (causal() | array, triangle | array),
        (array | causal(), triangle | array),
    ):
        np.testing.assert_array_equal(mask.materialize(4, 4)[0, 0], expected)


def test_as_mask_broadcasts_over_rows_and_heads():
    array = np.random.default_rng(0).random((3, 4, 5)) < 0.5
    mask = as_mask(array)
    assert isinstance(mask, DenseMask)
    np.testing.assert_array_equal(mask.materialize(4, 5), array[None])
    np.testing.assert_array_equal(as_mask(array[0, :1]).materialize(4, 5)[0, 0], array[0, :1].repeat(4, 0))


def test_combine_mask_with_function():
    mask = causal() & (lambda b, h, q, k: k % 2 == 0)
    assert mask.draw(3, 5).splitlines() == ["x . . . .", "x . . . .", "x . x . ."]


def test_mask_fn_rejects_non_scalar_result(refuses):
    with refuses("one scalar", "int32[2]"):
        mask_fn(lambda b, h, q, k: jnp.array([q, k]))


def test_per_head_block_summary_with_head_offset():
    mask = per_head([causal(), window(0, 0), window(1, 1), causal()])
    assert len(mask.masks) == 3  # both `causal()` are merged
    any_allowed, all_allowed = mask.block_summary(BlockGrid(4, 4, 2, 2, heads=2, offset=(0, 1, 0, 0)))
    np.testing.assert_array_equal(any_allowed[0, 0], np.eye(2, dtype=bool))
    assert any_allowed[0, 1].all() and all_allowed[0, 1].trace() == 2 and not all_allowed[0, 0].any()


def test_density_over_several_query_blocks():
    # Enough pairs that the queries are counted in more than one block.
    assert causal().density(3000, 3000) == pytest.approx(3000 * 3001 / 2 / 3000**2, abs=1e-12)
    assert (causal() & window(9, None)).density(3000, 3000) == pytest.approx(
        (3000 * 10 - 45) / 3000**2, abs=1e-12
    )


def test_draw_selects_row_and_head():
    def allows(b, h, q, k):
        return (k == b) | (k == 2 + h)

    assert mask_fn(allows).draw(2, 4) == "x . x .\nx . x ."
    assert mask_fn(allows).draw(1, 4, row=1, head=1) == ". x . x"
    assert as_mask(np.array([[True, False]])).draw(1, 2, row=3, head=1) == "x ."


def test_figure_shows_every_mask():
    public = {name: getattr(attention, name) for name in attention.__all__}
    makers = {name for name, x in public.items() if getattr(x, "__annotations__", {}).get("return") is Mask}
    combinators = {"mask_fn", "shift_mask", "per_head"}
    tree = ast.parse((Path(__file__).parents[3] / "docs" / "figures" / "masks.py").read_text())
    drawn = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "causal" in makers and combinators < makers
    assert makers - combinators <= drawn
