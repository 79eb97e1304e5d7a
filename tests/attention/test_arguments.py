"""`attend` rejects arguments of a wrong type in one line that says how to pass them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import (
    alibi,
    attend,
    causal,
    mask_fn,
    per_head,
    score_fn,
    segments,
    softcap,
    window,
)
from tests.attention.inputs import qkv

QUERY, KEY, VALUE = qkv(0)
KEEP = np.arange(7) < 4
ADDITIVE = np.where(KEEP, 0.0, -np.inf)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "complex64"])
def test_masks_that_are_not_boolean_are_rejected(refuses, unchecked, dtype):
    for mask in (KEEP.astype(jnp.dtype(dtype)), jnp.asarray(KEEP, jnp.dtype(dtype))):
        with refuses("must be boolean", dtype, "mask == 1", "mask == 0"):
            attend(QUERY, KEY, VALUE, mask=mask)
        with refuses("must be boolean"):
            attend(QUERY, KEY, VALUE, mask=causal() & mask)
        with refuses("must be boolean"):
            attend(QUERY, KEY, VALUE, mask=mask | causal())


def test_an_additive_mask_is_rejected_not_inverted(refuses, unchecked):
    with refuses("must be boolean", "float64", "score=bias(mask)"):
        attend(QUERY, KEY, VALUE, mask=ADDITIVE)


def test_converted_masks_agree_with_a_boolean_mask(unchecked):
    expected = attend(QUERY, KEY, VALUE, mask=KEEP)
    converted = (ADDITIVE == 0, KEEP.astype(int) == 1, KEEP.tolist(), jnp.asarray(KEEP)[None, None, None])
    for mask in converted:
        np.testing.assert_array_equal(attend(QUERY, KEY, VALUE, mask=mask), expected)
    traced = jax.jit(lambda keep: attend(QUERY, KEY, VALUE, mask=keep))(KEEP)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mask, words",
    [
        ("causal", "not 'causal'"),
        (True, "not True"),
        (np.True_, "not np.True_"),
        (1, "not 1"),
        (0.0, "not 0.0"),
        ({"a": 1}, "not {'a': 1}"),
        ([[1, 0]], "nested lists of booleans"),
        ([[True], [True, False]], "nested lists of booleans"),
        ([causal(), window(2)], "combine masks with &"),
        (np.zeros((1, 1, 1, 5, 7), bool), "0 to 4 dimensions"),
        (softcap(2.0), "pass it as score="),
        (causal, "causal(), not causal"),
        (window, "call it first"),
        (lambda q, k: q >= k, "takes (b, h, q, k); this function takes (q, k)"),
        (lambda b, h, q, k: jnp.where(q >= k, 0.0, -jnp.inf), "True or False"),
        (lambda b, h, q, k: q - k, "True or False"),
    ],
)
def test_other_masks_are_rejected(refuses, unchecked, mask, words):
    with refuses("mask", words):
        attend(QUERY, KEY, VALUE, mask=mask)


@pytest.mark.parametrize(
    "score, words",
    [
        (np.zeros((5, 7)), "wrap an array in bias(array)"),
        (jnp.zeros((5, 7)), "wrap an array in bias(array)"),
        ("softcap", "not 'softcap'"),
        (["softcap"], "not 'softcap'"),
        (2.0, "not 2.0"),
        (causal(), "pass it as mask="),
        ([softcap(2.0), causal()], "pass it as mask="),
        (softcap, "call it first"),
        (lambda b, h, q, k: q - k, "(score, b, h, q, k)"),
        (lambda s, b, h, q, k: q - k, "a floating-point number; it returns int32"),
        (lambda s, b, h, q, k: q >= k, "it returns bool"),
    ],
)
def test_other_scores_are_rejected(refuses, unchecked, score, words):
    with refuses("score", words):
        attend(QUERY, KEY, VALUE, score=score)


def test_masks_and_scores_have_no_truth_value():
    ids = segments(jnp.ones((2, 7), int))
    for use in (lambda: causal() and ids, lambda: causal() or ids, lambda: not causal(), lambda: bool(~ids)):
        with pytest.raises(TypeError, match="combine masks with &"):
            use()
    with pytest.raises(TypeError, match="several scores as a list"):
        softcap(2.0) and alibi(4)
    with pytest.raises(TypeError, match="no truth value"):
        assert mask_fn(lambda b, h, q, k: q >= k)
    with pytest.raises(TypeError, match="no truth value"):
        assert score_fn(lambda s, b, h, q, k: s)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_per_head_needs_one_mask_per_query_head(refuses, unchecked, count):
    mask = per_head([causal(i) for i in range(count)])
    for composed in (mask, window(3) & mask, ~(mask | causal())):
        with refuses(f"per_head got {count} masks for 4 query heads"):
            attend(QUERY, KEY, VALUE, mask=composed)
    with refuses("a list of one mask per query head"):
        per_head(causal())
    with refuses("a list of one mask per query head"):
        per_head([])


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_queries_keys_and_values_must_be_floating(refuses, unchecked, dtype):
    for position in range(3):
        arrays = [QUERY, KEY, VALUE]
        for array in (arrays[position].astype(dtype), np.zeros(arrays[position].shape, dtype)):
            arrays[position] = array
            with refuses("must be of floating dtype", dtype):
                attend(*arrays)
    with refuses("query must be an array"):
        attend(QUERY.tolist(), KEY, VALUE)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": True}, "scale must be a finite number"),
        ({"scale": "1"}, "scale must be a finite number"),
        ({"scale": jnp.ones(4)}, "scale must be a finite number"),
        ({"scale": 1j}, "scale must be a finite number"),
        ({"sinks": jnp.zeros(3)}, "one logit per query head, 4"),
        ({"sinks": jnp.zeros((1, 4))}, "sinks must have 1 dimension"),
        ({"sinks": jnp.zeros(4, int)}, "sinks must be of floating dtype"),
        ({"normalizer": None}, "normalizer must be a function"),
        ({"normalizer": "softmax"}, "normalizer must be a function"),
        ({"backend": None}, "a name or a Backend"),
        ({"dropout_rate": float("nan"), "dropout_key": jax.random.key(0)}, "dropout_rate"),
        ({"dropout_rate": True, "dropout_key": jax.random.key(0)}, "dropout_rate"),
        ({"dropout_rate": -0.1, "dropout_key": jax.random.key(0)}, "at least 0"),
        ({"dropout_rate": 0.1, "dropout_key": 0}, "jax.random.key(0)"),
        ({"dropout_rate": 0.1, "deterministic": None}, "deterministic must be True or False"),
        ({"dropout_rate": 0.1}, "pass deterministic=True for no dropout"),
        ({"dropout_mask": np.ones((1, 1, 7, 7))}, "dropout_mask must be of boolean dtype"),
        ({"dropout_rate": 0.1, "dropout_mask": np.ones((1, 1, 6, 7), bool)}, "7"),
        (
            {
                "dropout_rate": 0.1,
                "dropout_mask": np.ones((1, 1, 7, 7), bool),
                "dropout_key": jax.random.key(0),
            },
            "not both",
        ),
        ({"dropout_rate": 0.1, "deterministic": False}, "needs a dropout_key"),
    ],
)
def test_options_of_a_wrong_kind_are_rejected(refuses, unchecked, options, words):
    with refuses("attend: ", words):
        attend(QUERY, KEY, VALUE, **options)


def test_traced_scales_and_numpy_arrays_are_accepted(unchecked):
    expected = attend(QUERY, KEY, VALUE, scale=0.5)
    traced = jax.jit(lambda scale: attend(QUERY, KEY, VALUE, scale=scale))(0.5)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)
    arrays = [np.asarray(x, np.float64) for x in (QUERY, KEY, VALUE)]
    np.testing.assert_allclose(attend(*arrays, scale=np.float32(0.5)), expected, rtol=1e-5, atol=1e-6)


def test_deterministic_switches_dropout_off():
    plain, key = attend(QUERY, KEY, VALUE), jax.random.key(0)
    for options in ({}, {"dropout_key": key}):
        off = attend(QUERY, KEY, VALUE, dropout_rate=0.5, deterministic=True, **options)
        np.testing.assert_array_equal(off, plain)
    on = attend(QUERY, KEY, VALUE, dropout_rate=0.5, dropout_key=key)
    assert not np.allclose(on, plain)


def test_broadcast_dropout_drops_the_same_pairs_in_every_row_and_head():
    ones = jnp.broadcast_to(jnp.eye(7)[None, :, None], (2, 7, 2, 7))  # the output equals the weights
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    shared, separate = (
        np.asarray(attend(QUERY, KEY, ones, broadcast_dropout=broadcast, **options)) == 0
        for broadcast in (True, False)
    )
    assert (shared == shared[:1, :, :1]).all() and 0 < shared.mean() < 1
    assert not (separate == separate[:1, :, :1]).all()
