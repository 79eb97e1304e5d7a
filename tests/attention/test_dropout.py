"""Dropout: the same pairs on every backend and mesh, with the statistics of independent draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, bias, causal, segments
from attnlab.attention.backends.registry import AttentionArgs, softmax_only_reason
from attnlab.attention.dropout import HashDropout, hash_pairs
from attnlab.attention.pairwise import block_indices, pair_indices
from tests.attention.inputs import qkv, weighted_sum
from tests.selection import long

KEY = jax.random.key(3)
RATE = 0.3


def centred(rate, shape, key=KEY):
    """Return kept - (1 - rate) of all pairs in units of its standard deviation, float64."""
    kept = np.asarray(HashDropout.from_key(rate, key, False).keep(pair_indices(*shape)))
    assert kept.shape == shape
    return (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))


def is_standard(mean, count, sigmas=5):
    """Return whether a mean of `count` values with mean 0 and variance 1 is small enough."""
    return abs(mean) < sigmas / np.sqrt(count)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_kept_pairs_have_the_moments_of_independent_draws(rate, seed):
    x = centred(rate, (2, 4, 256, 256), jax.random.key(seed))
    assert is_standard(x.mean(), x.size)
    for axis in range(4):  # neighbouring rows of the batch, heads, queries and keys
        y = np.moveaxis(x, axis, 0)
        assert is_standard((y[1:] * y[:-1]).mean(), y[1:].size), axis
    corners = x[..., 1:, 1:] * x[..., :-1, :-1] * x[..., 1:, :-1] * x[..., :-1, 1:]
    assert is_standard(corners.mean(), corners.size)
    kurtosis = 1 / (rate * (1 - rate)) - 3  # of one draw; a sum of n draws has 1 / n of its excess
    for axes in ((3,), (2,), (0, 1)):
        n = np.prod([x.shape[axis] for axis in axes])
        sums = x.sum(axes) / np.sqrt(n)
        assert abs(sums.mean()) < 5 / np.sqrt(sums.size)
        assert abs(sums.var() - 1) < 5 * np.sqrt((2 + (kurtosis - 3) / n) / sums.size), axes


def test_rows_and_keys_of_dropout_are_uncorrelated():
    x = centred(0.5, (2, 2, 128, 128)).reshape(4 * 128, 128)
    products = x @ x.T / np.sqrt(128)  # each is a sum of 128 independent signs
    products = products[np.triu_indices(len(x), 1)]
    assert np.abs(products).max() < 6.5
    assert abs(products.var() - 1) < 5 * np.sqrt(2 / len(products))
    other = centred(0.5, (2, 2, 128, 128), jax.random.fold_in(KEY, 1)).reshape(4 * 128, 128)
    assert is_standard((x * other).mean(), x.size)


def test_bits_of_the_hash_are_uniform_and_change_with_every_bit_of_an_index():
    words = jax.random.bits(KEY, (3,), jnp.uint32)
    bits = np.asarray(hash_pairs(words, pair_indices(2, 4, 128, 128)))
    counts = np.bincount(bits.ravel() >> 24, minlength=256)
    expected = bits.size / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)
    start = jax.random.randint(KEY, (4, 4096), 0, 2**31 - 1)
    for axis in range(4):
        for bit in range(0, 31, 5):
            flipped = start.at[axis].set(start[axis] ^ (1 << bit))
            changed = np.asarray(hash_pairs(words, start) ^ hash_pairs(words, flipped))
            share = np.mean([(changed >> i) & 1 for i in range(32)], axis=1)
            assert np.abs(share - 0.5).max() < 6 * 0.5 / np.sqrt(4096), (axis, bit)


def test_a_block_has_the_bits_of_the_whole():
    dropout = HashDropout.from_key(RATE, KEY, False)
    whole = dropout.keep(pair_indices(3, 4, 20, 30))
    block = dropout.keep(block_indices((1, 2, 5, 7), (2, 2, 10, 20)))
    np.testing.assert_array_equal(block, whole[1:3, 2:4, 5:15, 7:27])
    shared = HashDropout.from_key(RATE, KEY, True).keep(pair_indices(3, 4, 20, 30))
    np.testing.assert_array_equal(shared, whole[:1, :1])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "raw"])
def test_every_kind_of_key_is_accepted(kind):
    keys = [jax.random.PRNGKey(i) if kind == "raw" else jax.random.key(i, impl=kind) for i in range(2)]
    a, b = (
        np.asarray(HashDropout.from_key(0.5, key, False).keep(pair_indices(1, 1, 64, 64))) for key in keys
    )
    assert is_standard(((2.0 * a - 1) * (2.0 * b - 1)).mean(), a.size)


def kept_on(mesh_of, text, spec, **options):
    """Return the pairs that `attend` keeps on a mesh, (B, H, T, S)."""
    ones, eye = jnp.ones((4, 16, 4, 2)), jnp.broadcast_to(jnp.eye(16)[None, :, None], (4, 16, 4, 16))
    run = jax.jit(lambda *x: attend(*x, dropout_rate=RATE, **options))
    if text is None:
        return np.swapaxes(run(ones, ones, eye), 1, 2) != 0  # the output equals the weights
    mesh = mesh_of(text)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (ones, ones, eye)]
        out = run(*placed)
        assert out.sharding.spec == spec
    return np.swapaxes(out, 1, 2) != 0


@pytest.mark.parametrize("broadcast", [False, True])
def test_every_mesh_drops_the_same_pairs(mesh_of, broadcast):
    options = {"dropout_key": KEY, "broadcast_dropout": broadcast}
    expected = HashDropout.from_key(RATE, KEY, broadcast).keep(pair_indices(4, 4, 16, 16))
    expected = np.broadcast_to(expected, (4, 4, 16, 16))
    np.testing.assert_array_equal(kept_on(mesh_of, None, None, **options), expected)
    for text, spec in (
        ("fsdp:4,tensor:2", P("fsdp", None, "tensor", None)),
        ("fsdp:4,tensor:2", P("fsdp", None, None, None)),
        ("data:2,tensor:4", P("data", None, "tensor", None)),
    ):
        np.testing.assert_array_equal(kept_on(mesh_of, text, spec, **options), expected)


def test_dropout_mask_keeps_its_pairs_on_every_mesh(mesh_of):
    for shape in ((4, 4, 16, 16), (1, 4, 16, 1), (4, 1, 1, 16)):
        mask = jax.random.bernoulli(KEY, 0.7, shape)
        expected = np.broadcast_to(mask, (4, 4, 16, 16))
        got = kept_on(mesh_of, None, None, dropout_mask=mask)
        sharded = kept_on(mesh_of, "fsdp:4,tensor:2", P("fsdp", None, "tensor", None), dropout_mask=mask)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(sharded, expected)


def gradients_of(backend, mask, score, **options):
    """Return a compiled function of query, key and value: outputs, and gradients of their sum."""

    def loss(query, key, value, score):
        out, lse = attend(
            query, key, value, mask=mask, score=score, backend=backend, return_lse=True, **options
        )
        if not jax.sharding.get_abstract_mesh().empty:
            out, lse = jax.sharding.reshard((out, lse), P())
        return weighted_sum(out, lse), (out, lse)

    grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    return lambda *arrays: grads(*arrays, score)


def assert_close(got, expected):
    for actual, desired in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        actual, desired = np.asarray(actual), np.asarray(desired)
        size = max(1.0, np.abs(desired[np.isfinite(desired)]).max())
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5 * size)


DROPOUTS = {
    "key": {"dropout_key": KEY},
    "broadcast": {"dropout_key": KEY, "broadcast_dropout": True},
    "mask": {"dropout_mask": jax.random.bernoulli(KEY, 0.7, (2, 1, 200, 200))},
    "sinks": {"dropout_key": KEY, "sinks": jnp.linspace(-1, 1, 4)},
}
MASKS = {
    "no mask": None,
    "causal": causal(),
    "segments": causal() & segments(jnp.arange(2 * 200).reshape(2, 200) // 70),
}


@pytest.mark.parametrize(
    ("backend", "mask", "options"),
    [
        ("blockwise", "no mask", "mask"),
        ("blockwise", "causal", "broadcast"),
        ("blockwise", "segments", "key"),  # each row has its own list of blocks
        ("blockwise", "segments", "mask"),
        ("blockwise", "causal", "sinks"),
        ("blockwise_autodiff", "segments", "key"),
    ],
)
def test_blockwise_matches_reference(backend, mask, options):
    arrays, score = qkv(0, b=2, t=200, s=200, d=4), bias(jnp.linspace(0, 1, 200)[None, None, None])
    results = [
        gradients_of(name, MASKS[mask], score, dropout_rate=RATE, **DROPOUTS[options])(*arrays)
        for name in (backend, "reference")
    ]
    assert_close(*results)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("ring", "mask"),
        long("ring", "key"),
        ("all_gather", "broadcast"),
        ("all_to_all", "key"),
        long("all_to_all", "mask"),
    ],
)
def test_sharded_lengths_match_one_device(backend, options):
    arrays, score = qkv(1, b=2, t=48, s=48, h=8, k=4), bias(jnp.linspace(0, 1, 48)[None, None, None])
    options = {"dropout_rate": RATE, **DROPOUTS[options]}
    if "dropout_mask" in options:
        options["dropout_mask"] = options["dropout_mask"][:, :, :48, :48]
    expected = gradients_of("reference", causal(), score, **options)(*arrays)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("data", "sequence", None, None))
        placed = [jax.device_put(x, sharding) for x in arrays]
        assert_close(gradients_of(backend, causal(), score, **options)(*placed), expected)


def test_memory_of_blockwise_is_linear_in_the_length():
    def peak(length, backend):
        def loss(q, k, v, key):
            return attend(q, k, v, mask=causal(), dropout_rate=RATE, dropout_key=key, backend=backend).sum()

        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, KEY)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = peak(2048, "blockwise"), peak(4096, "blockwise")
    assert long < 3 * short
    assert long < 4096 * 4096 / 4 < peak(4096, "reference")  # a bit per pair would be an eighth


@pytest.mark.parametrize("backend", ["splash", "flash", "cudnn", "tokamax", "decode"])
def test_other_backends_refuse_dropout(refuses, backend):
    arrays = qkv(0, t=1 if backend == "decode" else 5)
    with refuses(f"{backend!r} does not support"):
        attend(*arrays, backend=backend, dropout_rate=RATE, dropout_key=KEY)
    args = AttentionArgs(*arrays, dropout=HashDropout.from_key(RATE, KEY, False))
    assert softmax_only_reason(args) == "it does not support dropout"
