"""The normal form equals its mask, and finds each part of a conjunction in any order."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import (
    block_causal,
    causal,
    chunked,
    key_lengths,
    mask_fn,
    per_head,
    prefix,
    segments,
    shift_mask,
    window,
)
from attnlab.attention.masks.base import as_mask
from attnlab.attention.masks.basic import is_static, normal_form, static_part
from attnlab.attention.masks.causality import is_causal
from tests.attention.inputs import masks

B, T, S = 2, 7, 9
KINDS = (
    "masks",
    "causal",
    "window",
    "lengths",
    "lengths of both",
    "prefix",
    "chunked",
    "shifted",
    "function",
)


@st.composite
def conjunctions(draw):
    """Draw a conjunction of one to five masks; the normal form knows most kinds."""
    return functools.reduce(operator.and_, [draw(_part()) for _ in range(draw(st.integers(1, 5)))])


@st.composite
def _part(draw):
    offset, lengths = draw(st.integers(-3, 5)), jnp.asarray(draw(st.tuples(*[st.integers(0, 9)] * B)))
    match draw(st.sampled_from(KINDS)):
        case "causal":
            return causal(offset)
        case "window":
            return window(*draw(st.tuples(*[st.none() | st.integers(0, 5)] * 2)), offset)
        case "lengths":
            return key_lengths(draw(st.just(lengths) | st.integers(0, 9)))
        case "lengths of both":
            return key_lengths(lengths, draw(st.just(lengths) | st.integers(0, 7)))
        case "prefix":
            return prefix(lengths, offset)
        case "chunked":
            return chunked(3, offset)
        case "shifted":
            return shift_mask(causal(offset) & key_lengths(7), lengths)
        case "function":
            return mask_fn(lambda b, h, q, k: (k + q) % 3 != b)
    return draw(masks(B, T, S))


def pairs(mask):
    return np.ones((B, 1, T, S), bool) if mask is None else mask.materialize(T, S, B)


def test_no_mask():
    assert normal_form(None) == normal_form(window()) and normal_form(None).as_mask() is None


@settings(max_examples=150, deadline=None)
@given(conjunctions())
def test_normal_form_equals_the_mask(mask):
    np.testing.assert_array_equal(*np.broadcast_arrays(pairs(normal_form(mask).as_mask()), pairs(mask)))


@settings(max_examples=30, deadline=None)
@given(conjunctions())
def test_normal_form_of_a_traced_mask(mask):
    assert is_static(mask)
    got = jax.jit(lambda mask: pairs(normal_form(mask).as_mask()))(mask)
    np.testing.assert_array_equal(*np.broadcast_arrays(got, pairs(mask)))


@settings(max_examples=30, deadline=None)
@given(conjunctions())
def test_static_part_and_the_rest_are_the_mask(mask):
    """The static part is the whole static mask; a conjunction with a traced mask keeps it."""
    assert static_part(mask, (0, 0, 0, 0)) == (mask, True)

    @jax.jit
    def conjunction(ids):
        part, is_whole = static_part(segments(ids, ids[:, :1].repeat(S, 1)) & mask, (0, 0, 0, 0))
        assert not is_whole and is_static(part)
        return pairs(part)

    np.testing.assert_array_equal(*np.broadcast_arrays(conjunction(jnp.ones((B, T), int)), pairs(mask)))


def test_parts_are_merged_in_any_order():
    ids, lengths = jnp.ones((B, T), int), jnp.array([3, 5])
    function, packed, padding = (
        mask_fn(lambda b, h, q, k: q != k),
        segments(ids),
        key_lengths(lengths, lengths),
    )
    parts = [causal(2), packed, window(3, 4, offset=1), padding, prefix(2), function]
    for mask in (functools.reduce(operator.and_, order) for order in (parts, parts[::-1])):
        form = normal_form(mask)
        assert (form.left, form.right) == (2, 2) and not form.is_relative
        assert form.segments is packed and form.lengths is padding and form.rest is function
        assert [type(mask).__name__ for mask in form.intervals] == ["PrefixMask"]


@pytest.mark.parametrize(
    "offset", [2, np.int32(2), np.array(2), jnp.int32(2)], ids=["int", "scalar", "NumPy", "JAX"]
)
def test_a_static_offset_gives_a_number(offset):
    form = normal_form(causal(offset) & window(3, None, offset))
    assert form.static_bounds == (1, 2) and form.is_relative


def test_a_traced_offset_gives_a_traced_bound():
    @jax.jit
    def bounds(offset):
        form = normal_form(causal(offset) & causal(4) & window(3, None, offset))
        assert form.static_bounds is None and form.is_relative
        return form.left, form.right

    assert bounds(6) == (-3, 4) and bounds(1) == (2, 1)


def test_least_lengths_keep_that_queries_are_the_keys():
    """In self-attention, keys and queries have the same lengths."""
    a, b = jnp.array([3, 5]), jnp.array([4, 2])
    form = normal_form(key_lengths(a, a) & key_lengths(b, b))
    assert form.lengths.queries is form.lengths.keys
    np.testing.assert_array_equal(form.lengths.keys, [3, 2])


def slow_is_causal(mask):
    """Decide from all pairs of the first positions."""
    return not np.triu(np.asarray(mask.materialize(40, 40, 2, 4)), 1).any()


@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal(-1) & window(3, 3),
        causal(1),
        window(2, 0),
        window(None, 1),
        window(),
        prefix(0),
        prefix(2),
        chunked(8),
        block_causal(8),
        ~causal(),
        causal() | window(0, 0),
        causal() | segments(jnp.ones((1, 40), int)),
        key_lengths(3),
        np.tril(np.ones((40, 40), bool)),
        np.ones((40, 40), bool),
        shift_mask(causal(), 3),
        per_head([causal(), window(2, 0), causal(), window()]),
        per_head([causal(), window(2, 0)] * 2),
        mask_fn(lambda b, h, q, k: k <= q),
        mask_fn(lambda b, h, q, k: k // 16 <= q // 16),
        mask_fn(lambda b, h, q, k: (k <= q) | (h == 3)),
        mask_fn(lambda b, h, q, k: (k <= q) | (b == 1)),
        causal() & mask_fn(lambda b, h, q, k: k % 3 != h),
    ],
    ids=lambda mask: " ".join(repr(mask).split())[:60],
)
def test_is_causal(mask):
    assert is_causal(as_mask(mask)) == slow_is_causal(as_mask(mask))


def test_is_causal_finds_later_blocks():
    """The allowed pairs may be far from the beginning."""
    assert not is_causal(mask_fn(lambda b, h, q, k: (k <= q) | ((q // 1024 == 3) & (k // 1024 == 4))))
    assert not is_causal(None)
