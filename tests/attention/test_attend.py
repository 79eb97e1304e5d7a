"""`attend` on meshes of devices, its results, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, bias, causal, segments, softcap, window
from tests.attention.inputs import qkv, weighted_sum

ROWS = ("data", "fsdp")


def on_mesh(mesh_of, text, arrays, spec=None):
    mesh = mesh_of(text)
    spec = spec or P(ROWS, None, "tensor", None)
    return mesh, [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in arrays]


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("text", ["data:2,fsdp:2,tensor:2", "fsdp:4"])
def test_results_do_not_depend_on_the_mesh_and_keep_sharding(mesh_of, text, backend):
    arrays = qkv(0, b=4, t=7, s=7, h=4, k=2)
    ids = jnp.array([[1] * 4 + [2] * 3, [1] * 7, [0] * 2 + [1] * 5, [1] * 6 + [0]])

    @jax.jit
    def run(query, key, value, ids):
        def loss(query, key, value):
            mask = causal() & segments(ids) & window(3, None)
            out, lse = attend(
                query, key, value, mask=mask, score=softcap(3.0), backend=backend, return_lse=True
            )
            if not jax.sharding.get_abstract_mesh().empty:
                assert jax.typeof(out).sharding.spec == jax.typeof(query).sharding.spec
                assert jax.typeof(lse).sharding.spec == P(*jax.typeof(query).sharding.spec[:3])
                lse, out = jax.sharding.reshard((lse, out), P())
            return weighted_sum(out, lse), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    expected = run(*arrays, ids)
    mesh, placed = on_mesh(mesh_of, text, arrays)
    with jax.set_mesh(mesh):
        got = run(*placed, ids)  # the replicated segments are resharded by `attend`
        assert got[1][0].sharding.spec == P(ROWS, None, "tensor", None)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


def test_functions_traced_on_a_mesh_run_on_each_shard(mesh_of):
    """As in a model, mask and score are traced with global arrays and evaluated on shards."""
    arrays = qkv(0, b=4, t=40, s=40, h=4, k=2)
    ids, slopes = jnp.arange(4 * 40).reshape(4, 40) // 13, jnp.linspace(0.1, 0.4, 4)

    @jax.jit
    def run(query, key, value, ids, slopes):
        def loss(query, slopes):
            mask = causal() & (
                lambda b, h, q, k: (jnp.abs(q - k) % 3 == 0) | (ids[b, q] == ids[b, k]) & (h > 1)
            )

            def score(s, b, h, q, k):
                return s - slopes[h] * jax.nn.relu(jnp.bitwise_count(q - k + ids[0, 0]) + b)

            out = attend(query, key, value, mask=mask, score=score)
            out = out if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(out, P())
            return weighted_sum(out, jnp.zeros(1))

        return jax.value_and_grad(loss, (0, 1))(query, slopes)

    expected = run(*arrays, ids, slopes)
    mesh, placed = on_mesh(mesh_of, "data:2,fsdp:2,tensor:2", arrays)
    with jax.set_mesh(mesh):
        got = run(*placed, ids, slopes)
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-4)


def test_single_key_head_may_be_replicated(mesh_of):
    query, key, value = qkv(1, b=2, h=4, k=1)
    mesh, (placed_query,) = on_mesh(mesh_of, "fsdp:2,tensor:2", [query])
    _, others = on_mesh(mesh_of, "fsdp:2,tensor:2", [key, value], P(ROWS, None, None, None))
    with jax.set_mesh(mesh):
        got = jax.jit(attend)(placed_query, *others)
    np.testing.assert_allclose(got, attend(query, key, value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "query_spec, key_spec, words",
    [
        (P(None, "fsdp", None, None), P(), "like the query"),
        (P(None, None, None, "fsdp"), P(None, None, None, "fsdp"), "head_dim must not be sharded"),
        (P("fsdp", None, None, None), P("fsdp", "tensor", None, None), "like the query"),
        (P("fsdp", None, "tensor", None), P("fsdp", None, None, None), "like the query"),
        (P("fsdp", None, None, None), P(), "like the query"),
        (P(), P("fsdp", None, None, None), "like the query"),
    ],
)
def test_mismatched_shardings_are_rejected(mesh_of, refuses, query_spec, key_spec, words):
    query, key, value = qkv(1, b=2, t=4, s=4, h=4, k=2, d=2, dv=2)
    mesh, (query,) = on_mesh(mesh_of, "fsdp:2,tensor:2", [query], query_spec)
    _, (key, value) = on_mesh(mesh_of, "fsdp:2,tensor:2", [key, value], key_spec)
    with jax.set_mesh(mesh), refuses(words, "reshard first"):
        attend(query, key, value)


def test_optional_outputs_are_returned_in_order():
    query, key, value = qkv(2)
    out, lse, weights = attend(query, key, value, return_lse=True, return_weights=True)
    assert (out.shape, lse.shape, weights.shape) == ((2, 5, 4, 3), (2, 5, 4), (2, 4, 5, 7))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(attend(query, key, value, backend="blockwise"), out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(attend(query * 6**0.5, key, value, scale=1 / 6), out, rtol=1e-5, atol=1e-5)


def test_invalid_arguments_raise_one_line_errors(refuses, unchecked):
    query, key, value = qkv(3)
    with refuses("(batch, length, heads, head_dim)", "(5, 4, 6)"):
        attend(query[0], key, value)
    with refuses("(batch, length, heads, head_dim)", "(5, 4)"):
        attend(query[0, ..., 0], key, value)
    with refuses("batch, length and heads", "(1, 7, 2, 3)"):
        attend(query, key, value[:1])
    with refuses("the same head_dim"):
        attend(query[..., :2], key, value)
    with refuses("multiple of key heads"):
        attend(query[:, :, :3], key, value)
    with refuses(
        "unknown backend 'fast'",
        "auto, ring, all_to_all, all_gather, splash, flash, cudnn, tokamax, decode, blockwise, blockwise_autodiff",
    ):
        attend(query, key, value, backend="fast")
    with refuses("'blockwise' does not support", "weights", "return_weights"):
        attend(query, key, value, backend="blockwise", return_weights=True)
    with refuses("(batch, keys) in the mask", "has 6 keys; the scores have 7"):
        attend(query, key, value, mask=segments(jnp.ones((2, 5), int), jnp.ones((2, 6), int)))
    with refuses("in the score", "has 3 heads; the scores have 4"):
        attend(query, key, value, score=bias(jnp.ones((3, 1, 1))))
    with refuses("one scalar", "float32[2]"):
        attend(query, key, value, score=lambda s, b, h, q, k: s * jnp.ones(2))
    with refuses("dropout_rate", "less than 1"):
        attend(query, key, value, dropout_rate=1.0, dropout_key=jax.random.key(0))


def test_swapped_layout_error_gives_a_hint(refuses, unchecked):
    swapped = [jnp.swapaxes(x, 1, 2) for x in qkv(4, t=5, s=7, h=4, k=2)]
    with refuses("not (batch, heads, length, head_dim)"):
        attend(*swapped)
