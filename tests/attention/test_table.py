"""Blockwise attention with every mask and score against the full score matrix.

Outputs, log-sum-exp and the gradients of all arrays are compared.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention import mask_fn
from attnlab.attention.backends.blockwise import blockwise
from attnlab.attention.backends.blockwise_autodiff import blockwise_autodiff
from attnlab.attention.backends.reference import reference
from attnlab.attention.backends.registry import apply_sinks
from attnlab.attention.relative_scores import alibi, cope, relative_bias, shaw, t5_bias
from attnlab.attention.scores import (
    ForgettingScore,
    as_score,
    bias,
    log_temperature,
    score_fn,
    softcap,
    step_temperature,
    temperature,
)
from tests.attention.definitions import CASES, B, H, S
from tests.attention.inputs import SHAPES, masks, weighted_sum
from tests.selection import sample


def positions(x):
    """Return an unordered position for each query."""
    return jnp.arange(x.query.shape[0] * x.query.shape[1]).reshape(x.query.shape[:2]) * 7 % 11


# For each score: the shapes of its arrays, in letters for batch, heads, queries (t), keys (s) and
# width (d); and a function that makes it.
SCORES = {
    "none": ({}, lambda x: None),
    "softcap": ({}, lambda x: softcap(1.5)),
    "bias": ({"bias": "bhts"}, lambda x: bias(x.bias)),
    "bias of keys": ({"bias": "b11s"}, lambda x: bias(x.bias)),
    "alibi": ({}, lambda x: alibi(x.query.shape[2], x.offset)),
    "alibi with given slopes": ({"slopes": "h"}, lambda x: alibi(x.slopes, x.offset)),
    "relative bias": ({"table": "7h"}, lambda x: relative_bias(x.table, x.offset)),
    "t5 bias": ({"table": "8h"}, lambda x: t5_bias(x.table, max_distance=9, offset=x.offset)),
    "shaw": ({"table": "7d"}, lambda x: shaw(x.query, x.table, offset=x.offset)),
    "cope": ({"table": "5d"}, lambda x: cope(x.query, x.key, x.table, x.mask)),
    "forgetting": ({"queries": "bht1", "keys": "bh1s"}, lambda x: ForgettingScore(x.queries, x.keys)),
    "temperature": ({"factor": "b1t1"}, lambda x: temperature(x.factor)),
    "step temperature": ({}, lambda x: step_temperature(positions(x), floor=3)),
    "log temperature": ({"scale": "h"}, lambda x: log_temperature(positions(x), x.scale)),
    "function": ({"table": "bt"}, lambda x: score_fn(lambda s, b, h, q, k: s * x.table[b, q] + h - 0.1 * k)),
    "chain": (
        {"bias": "1hts", "slopes": "h"},
        lambda x: as_score([bias(x.bias), softcap(1.5), alibi(x.slopes, x.offset)]),
    ),
}
BLOCK_SIZES = (4, 4), (16, 8)


def full_matrix(x, score, scale):
    out, lse, _ = reference(x.query, x.key, x.value, mask=x.mask, score=score, scale=scale, sinks=x.sinks)
    return out, lse


def by_blocks(x, score, scale, function, block_sizes):
    result = function(x.query, x.key, x.value, mask=x.mask, score=score, scale=scale, block_sizes=block_sizes)
    return result if x.sinks is None else apply_sinks(*result, x.sinks)


def assert_agree(
    mask, score, shape, sinks, block_sizes, traced=True, function=blockwise, dtype=jnp.float32, tolerance=1e-5
):
    """Compare a blockwise function with the reference.

    Errors are relative to the greatest absolute value of the array, or to 1 if that is greater.
    """
    letters, make = SCORES[score]
    letters = {"query": "bthd", "key": "bskd", "value": "bskv", **letters} | ({"sinks": "h"} if sinks else {})
    sizes = {**shape, "v": shape["dv"]}
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=[sizes.get(c) or int(c) for c in letters[n]]) for n in letters}
    arrays = {n: jnp.asarray(x, dtype if n in ("query", "key", "value") else None) for n, x in arrays.items()}

    def run(attention, arrays, mask, **kwargs):
        def loss(arrays):
            x = SimpleNamespace(**{"sinks": None, **arrays}, mask=mask, offset=shape["s"] - shape["t"])
            result = attention(x, make(x), 0.6, **kwargs)
            return weighted_sum(*result), result

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    def both(arrays, mask=mask):
        return run(by_blocks, arrays, mask, function=function, block_sizes=block_sizes), run(
            full_matrix, arrays, mask
        )

    ((_, got), gradients), ((_, expected), exact) = jax.jit(both)(arrays, *[mask] * traced)
    results = {"out": got[0], "lse": got[1], **gradients}
    for name, desired in {"out": expected[0], "lse": expected[1], **exact}.items():
        assert results[name].dtype == desired.dtype
        actual, desired = (np.asarray(x, np.float32) for x in (results[name], desired))
        size = max(1, np.abs(desired[np.isfinite(desired)]).max(initial=0))
        np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * size, err_msg=name)


def nth_setup(n, name):
    """Return a mask of `definitions` with shapes, sinks, block sizes and tracing varied by n."""
    heads, kv_heads = ((H, H), (H, 1), (6, 2))[n % 3]
    if name in ("blocks", "per_head", "dense"):  # these are defined for H heads
        heads, kv_heads = H, (H, 1)[n % 2]
    mask, _, queries = CASES[name]()
    shape = {"b": B, "t": queries, "s": S, "h": heads, "k": kv_heads, "d": 4, "dv": 3}
    options = {"sinks": n % 5 % 2 == 0, "block_sizes": BLOCK_SIZES[n % 7 % 2], "traced": n % 2 == 0}
    return {"mask": mask, "shape": shape, **options}


@pytest.mark.parametrize("name", sample(CASES, every=3))
def test_every_mask(name):
    n = list(CASES).index(name)
    assert_agree(score=list(SCORES)[n % len(SCORES)], **nth_setup(n, name))


@pytest.mark.slow
@pytest.mark.parametrize("score", list(SCORES)[::3])
def test_scores_with_blockwise_autodiff(score):
    n = list(SCORES).index(score)
    assert_agree(
        score=score, function=blockwise_autodiff, **nth_setup(n, list(CASES)[-n]) | {"block_sizes": (8, 8)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("score", sample(SCORES, every=2))
def test_every_score_in_bfloat16(score):
    # The reference rounds only its result. Blockwise attention also rounds the weights and the
    # gradients of the scores (2^-8 each).
    n = list(SCORES).index(score)
    kwargs = nth_setup(n, list(CASES)[2 * n]) | {"block_sizes": (8, 8)}
    assert_agree(score=score, dtype=jnp.bfloat16, tolerance=2**-7, **kwargs)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    st.data(),
    st.sampled_from(SHAPES),
    st.sampled_from(list(SCORES)),
    st.booleans(),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from([blockwise, blockwise_autodiff]),
)
def test_random_masks_and_shapes(data, shape, score, sinks, block_sizes, function):
    mask = data.draw(masks(shape["b"], shape["t"], shape["s"]))
    row = data.draw(st.none() | st.integers(0, shape["t"] - 1))
    if row is not None:
        mask &= mask_fn(lambda b, h, q, k: q != row)
    assert_agree(mask, score, shape, sinks, block_sizes, function=function)
