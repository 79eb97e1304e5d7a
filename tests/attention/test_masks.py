import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import causal_pairs
from attnlab.attention.masks import Slots, causal, segments, window
from tests.attention.inputs import allowed_pairs, masks

B, T, S = 2, 6, 9


@settings(max_examples=60, deadline=None)
@given(masks(B, T, S))
def test_a_mask_allows_the_pairs_of_its_definition(mask):
    got = jnp.broadcast_to(mask.materialize(T, S), (B, 1, T, S))[:, 0]
    np.testing.assert_array_equal(got, allowed_pairs(mask, B, T, S))


@settings(max_examples=60, deadline=None)
@given(masks(B, T, S), st.integers(0, T - 1), st.integers(0, T - 1))
def test_no_pair_is_allowed_outside_of_reach(mask, a, b):
    first, last = min(a, b), max(a, b)
    low, high = mask.reach(first, last, S)
    assert 0 <= low <= high <= S
    rows = allowed_pairs(mask, B, T, S)[:, first : last + 1]
    assert not rows[:, :, :low].any()
    assert not rows[:, :, high:].any()


def test_reach_skips_what_causal_windows_exclude():
    assert causal().reach(4, 7, 20) == (0, 8)
    assert causal(-10).reach(4, 7, 20) == (0, 0)
    assert window(2, 1).reach(4, 7, 20) == (2, 9)
    assert (causal() & window(2, None)).reach(4, 7, 20) == (2, 8)
    assert (causal() | window(0, 5)).reach(4, 7, 20) == (0, 13)


def test_blocks_are_parts_of_the_whole():
    mask = (causal(2) & segments(jnp.array([[1, 1, 2, 2, 0, 3]]))) | ~window(1, 3)
    whole = mask.materialize(6, 6)
    np.testing.assert_array_equal(mask.block(jnp.arange(2, 5), jnp.arange(1, 6)), whole[:, :, 2:5, 1:6])


def test_slots_are_a_causal_window_at_a_traced_index():
    @jax.jit
    def at(first):
        return Slots(first, left=2).materialize(3, 9)

    for first in range(6):
        expected = (causal(first) & window(2, None, first)).materialize(3, 9)
        np.testing.assert_array_equal(at(first), expected)


def test_causal_pairs_counts_the_mask():
    for length in (1, 5, 8):
        for left in (None, 0, 2, 7, 30):
            counted = (causal() & window(left, None)).materialize(length, length).sum()
            assert causal_pairs(length, left) == counted
