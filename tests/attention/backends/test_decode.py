"""The decode backend against the reference: outputs, and gradients of all arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attend, bias, causal, explain, segments, softcap, window
from attnlab.attention.backends.decode import decode
from attnlab.attention.backends.reference import reference
from attnlab.attention.backends.registry import AttentionArgs, select_backend
from attnlab.attention.block_mask import default_block_sizes
from tests.attention.inputs import qkv, weighted_sum
from tests.attention.test_table import SCORES, assert_agree


@pytest.mark.parametrize("score", SCORES)
def test_decode_matches_reference_for_every_score(score):
    n = list(SCORES).index(score)
    b = 1 + n % 2
    shape = {"b": b, "t": 1, "s": 9, "h": 6, "k": (6, 2, 1)[n % 3], "d": 4, "dv": 3}
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])[-b:]
    mask = causal(7) & segments(ids[:, 7:8], ids)
    assert_agree(
        mask,
        score,
        shape,
        sinks=n % 2 == 0,
        block_sizes=None,
        function=lambda *arrays, block_sizes, **options: decode(*arrays, **options),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_row_without_keys_has_zero_output(dtype, tolerance):
    arrays = qkv(0, b=2, t=1, s=8, h=4, k=2, dtype=jnp.dtype(dtype))
    mask = segments(jnp.array([[3], [0]]), jnp.array([[3] * 5 + [0] * 3, [0] * 8]))
    got, expected = decode(*arrays, mask=mask), reference(*arrays, mask=mask)
    assert (got[0][1] == 0).all() and (got[1][1] == -jnp.inf).all()
    for actual, desired in zip(got, expected, strict=False):
        assert actual.dtype == desired.dtype
        actual, desired = (np.asarray(x, np.float32) for x in (actual, desired))
        np.testing.assert_allclose(actual, desired, atol=tolerance, rtol=tolerance)
    gradients = jax.grad(lambda *a: weighted_sum(*decode(*a, mask=mask)), (0, 1, 2))(*arrays)
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_auto_selects_decode_only_for_one_query():
    query, key, value = qkv(0, t=1, s=6)
    assert "decode" in str(explain(query, key, value, mask=causal(5))).splitlines()[0]
    two_queries = jnp.concatenate([query, query], axis=1)
    text = str(explain(two_queries, key, value, mask=causal(4)))
    assert "blockwise" in text.splitlines()[0] and "it supports one query per row, not 2" in text


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_decode_in_one_block_of_all_keys(platform):
    query, key, value = qkv(0, t=1, s=5000)
    args = AttentionArgs(query, key, value, mask=causal(4999), platform=platform)
    assert select_backend("auto", args).name == "blockwise"
    assert default_block_sizes(1, 5000, None, platform, rows=2 * 4) == (1, 5000)
    assert default_block_sizes(1, 2**20, None, platform, rows=2**10) == (1, 2**16)


def test_results_do_not_depend_on_the_mesh(mesh_of):
    arrays = qkv(0, b=4, t=1, s=9, h=4, k=2)
    term = jnp.linspace(0, 1, 4 * 9).reshape(1, 4, 1, 9)

    @jax.jit
    def run(query, key, value, term):
        options = {"mask": window(4, None, 8), "score": [bias(term), softcap(3.0)]}
        return attend(query, key, value, **options, backend="decode", return_lse=True)

    expected = run(*arrays, term)
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        spec = jax.P(("data", "fsdp"), None, "tensor")
        got = run(*(jax.device_put(x, spec) for x in arrays), term)
    for actual, desired in zip(got, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)
