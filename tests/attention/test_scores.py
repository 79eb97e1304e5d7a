import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, causal, reference
from attnlab.attention.backends.blockwise import blockwise
from attnlab.attention.pairwise import pair_indices
from attnlab.attention.relative_scores import alibi, cope, relative_bias, shaw, t5_bias
from attnlab.attention.scores import (
    ForgettingScore,
    as_score,
    bias,
    forgetting,
    log_temperature,
    score_fn,
    softcap,
    step_temperature,
    temperature,
)


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


B, T, S, H, K, D = 2, 5, 11, 4, 2, 3
OFFSET = S - T
SCALE = 0.4
INPUTS = {"query": 2 * draw(B, T, H, D), "key": 2 * draw(B, S, K, D), "value": draw(B, S, K, 2)}
LOSS = draw(B, T, H, 3)
POSITIONS = np.array([[0, 1, 2, 3, 4], [9, 2, 30, 7, 0]])


def clip(distance, most):
    return min(max(distance, -most), most) + most


def slope(h):
    return 2.0 ** (-8 * (h + 1) / H)


def product(x, b, h, i, j):
    return SCALE * x.query[b, i, h] @ x.key[b, j, h // (H // K)]


def contextual(x, b, h, i, j):
    """Return CoPE's bias from its definition; the gates are those of keys j to i + OFFSET."""
    gates = [1 / (1 + math.exp(-product(x, b, h, i, m))) for m in range(j, i + OFFSET + 1)]
    position = min(sum(gates), len(x.table) - 1)
    low = int(position)
    high = min(low + 1, len(x.table) - 1)
    embedding = (low + 1 - position) * x.table[low] + (position - low) * x.table[high]
    return x.query[b, i, h] @ embedding


# For each score: its arrays; a function that makes it from them and the inputs; and its definition
# for one pair, (x, s, b, h, i, j).
CASES = {
    "softcap": ({}, lambda x: softcap(1.5), lambda x, s, b, h, i, j: 1.5 * math.tanh(s / 1.5)),
    "bias": (
        {"bias": draw(H, 1, S)},
        lambda x: bias(x.bias),
        lambda x, s, b, h, i, j: s + x.bias[h, 0, j],
    ),
    "alibi": (
        {},
        lambda x: alibi(H, OFFSET),
        lambda x, s, b, h, i, j: s - slope(h) * abs(j - i - OFFSET),
    ),
    "alibi with given slopes": (
        {"slopes": draw(H) ** 2},
        lambda x: alibi(x.slopes, OFFSET - 2),
        lambda x, s, b, h, i, j: s - x.slopes[h] * abs(j - i - OFFSET + 2),
    ),
    "relative bias": (
        {"table": draw(7, H)},
        lambda x: relative_bias(x.table, OFFSET),
        lambda x, s, b, h, i, j: s + x.table[clip(j - i - OFFSET, 3), h],
    ),
    "shaw": (
        {"table": draw(7, D)},
        lambda x: shaw(x.query, x.table, scale=SCALE, offset=OFFSET),
        lambda x, s, b, h, i, j: s + SCALE * x.query[b, i, h] @ x.table[clip(j - i - OFFSET, 3)],
    ),
    "temperature": (
        {"factor": draw(B, 1, T, 1)},
        lambda x: temperature(x.factor),
        lambda x, s, b, h, i, j: s * x.factor[b, 0, i, 0],
    ),
    "step temperature": (
        {},
        lambda x: step_temperature(jnp.asarray(POSITIONS), floor=3, coefficient=0.7),
        lambda x, s, b, h, i, j: s * (math.log(math.floor((POSITIONS[b, i] + 1) / 3) + 1) * 0.7 + 1),
    ),
    "log temperature": (
        {},
        lambda x: log_temperature(jnp.asarray(POSITIONS), 1 / math.log(8)),
        lambda x, s, b, h, i, j: s * math.log(POSITIONS[b, i] + 1, 8),
    ),
    "log temperature with a scale per head": (
        {"scale": draw(H)},
        lambda x: log_temperature(jnp.asarray(POSITIONS), x.scale),
        lambda x, s, b, h, i, j: s * x.scale[h] * math.log(POSITIONS[b, i] + 1),
    ),
    "forgetting": (
        {"queries": draw(B, H, T, 1), "keys": draw(B, H, 1, S)},
        lambda x: ForgettingScore(x.queries, x.keys),
        lambda x, s, b, h, i, j: s + x.queries[b, h, i, 0] - x.keys[b, h, 0, j],
    ),
    "cope": (
        {"table": draw(4, D)},
        lambda x: cope(x.query, x.key, x.table, causal(OFFSET), scale=SCALE),
        lambda x, s, b, h, i, j: s + contextual(x, b, h, i, j),
    ),
    "a function": (
        {"table": draw(B, T)},
        lambda x: score_fn(lambda s, b, h, q, k: s * x.table[b, q] + h - k),
        lambda x, s, b, h, i, j: s * x.table[b, i] + h - j,
    ),
    "in order": (
        {"bias": draw(1, S), "slopes": draw(H) ** 2},
        lambda x: as_score([None, bias(x.bias), softcap(1.5), alibi(x.slopes, OFFSET)]),
        lambda x, s, b, h, i, j: (
            1.5 * math.tanh((s + x.bias[0, j]) / 1.5) - x.slopes[h] * abs(j - i - OFFSET)
        ),
    ),
}


def oracle(x, change):
    """Return the loss of attention, computed pair by pair in float64."""
    loss = 0.0
    for b, i, h in np.ndindex(B, T, H):
        keys = range(i + OFFSET + 1)
        scores = np.array([change(x, product(x, b, h, i, j), b, h, i, j) for j in keys])
        lse = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        out = np.exp(scores - lse) @ x.value[b, : len(keys), h // (H // K)]
        loss += out @ LOSS[b, i, h, :-1] + lse * LOSS[b, i, h, -1]
    return loss


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_loop(name):
    arrays, make, change = CASES[name]
    arrays = {n: np.float32(x) for n, x in {**INPUTS, **arrays}.items()}

    def loss(arrays, attention, **more):
        x = SimpleNamespace(**arrays)
        mask, scale = causal(OFFSET), SCALE
        out, lse, *_ = attention(x.query, x.key, x.value, mask=mask, score=make(x), scale=scale, **more)
        return jnp.sum(out * LOSS[..., :-1]) + jnp.sum(lse * LOSS[..., -1])

    @jax.jit
    def both(arrays):
        tiled = jax.value_and_grad(lambda x: loss(x, blockwise, block_sizes=(2, 4)))(arrays)
        return tiled, jax.value_and_grad(lambda x: loss(x, reference))(arrays)

    exact = {n: x.astype(np.float64) for n, x in arrays.items()}
    value = oracle(SimpleNamespace(**exact), change)
    for got, gradients in both(jax.tree.map(jnp.asarray, arrays)):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)
        for n, x in exact.items():
            step = 1e-6 * np.random.default_rng(1).normal(size=x.shape)
            more, less = (oracle(SimpleNamespace(**{**exact, n: x + y}), change) for y in (step, -step))
            slope = np.vdot(step, np.asarray(gradients[n], np.float64)) / 1e-6
            np.testing.assert_allclose(slope, (more - less) / 2e-6, rtol=1e-4, atol=1e-4, err_msg=n)
    (_, tiled), (_, whole) = both(jax.tree.map(jnp.asarray, arrays))
    for n in arrays:
        np.testing.assert_allclose(tiled[n], whole[n], rtol=1e-4, atol=1e-5, err_msg=n)


def apply_to_zeros(score, heads, queries, keys, batch=1):
    """Return a score applied to scores of 0."""
    return np.asarray(
        score(jnp.zeros((batch, heads, queries, keys)), pair_indices(batch, heads, queries, keys))
    )


def test_forgetting_multiplies_gates_between_key_and_query():
    gates = np.random.default_rng(0).uniform(0.1, 1, size=(2, 6, 3))
    got = apply_to_zeros(forgetting(jnp.asarray(np.log(gates), jnp.float32)), 3, 6, 6, batch=2)
    for b, h, i in np.ndindex(2, 3, 6):
        for j in range(i + 1):
            np.testing.assert_allclose(np.exp(got[b, h, i, j]), gates[b, j + 1 : i + 1, h].prod(), rtol=1e-5)


def bucket(distance, count, most):
    """Return T5's bucket of a distance >= 0, in integer arithmetic.

    The logarithmic buckets start at exact * (most / exact)^(n / rest).
    """
    exact = count // 2
    rest = count - exact
    if distance < exact:
        return distance
    reached = [n for n in range(rest) if exact ** (rest - n) * most**n <= distance**rest]
    return exact + max(reached)


@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 20), (14, 50)])
def test_t5_buckets_match_definition(buckets, most):
    table = jnp.arange(buckets, dtype=jnp.float32)[:, None]
    for bidirectional in (True, False):
        got = apply_to_zeros(
            t5_bias(table, bidirectional=bidirectional, max_distance=most, offset=60), 1, 9, 220
        )
        count = buckets // 2 if bidirectional else buckets
        for i, j in np.ndindex(9, 220):
            ahead = j - i - 60
            expected = bucket(max(-ahead, 0), count, most)
            if bidirectional and ahead > 0:
                expected = count + bucket(ahead, count, most)
            assert got[0, 0, i, j] == expected, (i, j)


def test_alibi_slopes_of_power_of_two():
    np.testing.assert_array_equal(alibi(8).slopes, 0.5 ** np.arange(1, 9))


@pytest.mark.parametrize("heads", [3, 12, 15])
def test_alibi_slopes_of_other_numbers_of_heads(heads):
    below = 2 ** math.floor(math.log2(heads))
    slopes = {n: [2 ** (-8 * i / n) for i in range(1, n + 1)] for n in (below, 2 * below)}
    expected = slopes[below] + slopes[2 * below][::2][: heads - below]
    np.testing.assert_allclose(alibi(heads).slopes, expected, rtol=1e-6)


def test_traced_offset():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in INPUTS.values())
    table = jnp.asarray(draw(7, H), jnp.float32)

    def loss(table, offset):
        score = [relative_bias(table, offset), alibi(H, offset)]
        return attend(query, key, value, mask=causal(offset), score=score, backend="blockwise").sum()

    got = jax.jit(jax.value_and_grad(loss))(table, jnp.int32(OFFSET))
    for x, expected in zip(got, jax.value_and_grad(loss)(table, OFFSET), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_scores_with_sharded_rows_and_heads(mesh_of):
    arrays = {n: jnp.asarray(x, jnp.float32) for n, x in INPUTS.items()}
    arrays |= {"bias": draw(B, H, T, S), "slopes": draw(H) ** 2, "table": draw(7, H), "shaw": draw(7, D)}
    arrays |= {"scale": draw(H), "cope": draw(4, D), "queries": draw(B, H, T, 1), "keys": draw(B, H, 1, S)}
    arrays = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}

    def loss(arrays, backend):
        x = SimpleNamespace(**arrays)
        score = [
            *(bias(x.bias), alibi(x.slopes, OFFSET), relative_bias(x.table, OFFSET)),
            *(shaw(x.query, x.shaw, offset=OFFSET), ForgettingScore(x.queries, x.keys)),
            log_temperature(jnp.asarray(POSITIONS), x.scale),
            cope(x.query, x.key, x.cope, causal(OFFSET)),
        ]
        out = attend(x.query, x.key, x.value, mask=causal(OFFSET), score=score, backend=backend)
        return (out * LOSS[..., :-1]).sum()

    expected = jax.grad(loss)(arrays, "blockwise")
    with jax.set_mesh(mesh_of("data:2,tensor:2")):
        for n in ("query", "key", "value"):
            arrays[n] = jax.device_put(arrays[n], P("data", None, "tensor", None))
        got = jax.jit(jax.grad(loss), static_argnums=1)(arrays, "blockwise")
    for n in arrays:
        np.testing.assert_allclose(got[n], expected[n], rtol=1e-4, atol=1e-5, err_msg=n)


def test_rejects_invalid_arguments(refuses):
    with refuses("alibi", "at least 1", "0"):
        alibi(0)
    with refuses("relative_bias", "2m + 1", "6"):
        relative_bias(jnp.zeros((6, H)))
    with refuses("shaw", "2m + 1", "6"):
        shaw(jnp.zeros((B, T, H, D)), jnp.zeros((6, D)))
    with refuses("t5_bias", "at least 4 buckets", "got 3"):
        t5_bias(jnp.zeros((3, H)))
    with refuses("t5_bias", "over", "8", "got 32 buckets and max_distance 8"):
        t5_bias(jnp.zeros((32, H)), max_distance=8)


@pytest.mark.parity
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20, 31])
def test_alibi_slopes_match_bloom(heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    hf_alibi = bloom.build_alibi_tensor(torch.ones(1, 4, dtype=torch.int64), heads, torch.float32)
    np.testing.assert_allclose(alibi(heads).slopes, hf_alibi[:, 0, 1], rtol=1e-6)


@pytest.mark.parity
def test_parity_with_bloom():
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    query, key, value = np.random.default_rng(0).normal(size=(3, B, S, H, D)).astype(np.float32)
    hf_alibi = bloom.build_alibi_tensor(torch.ones(B, S, dtype=torch.int64), H, torch.float32)
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    mask = hf_alibi.reshape(B, H, 1, S) + torch.full((S, S), -torch.inf).triu(1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    got = attend(*map(jnp.asarray, (query, key, value)), mask=causal(), score=alibi(H))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_parity_of_shaw_with_torch_loop():
    torch = pytest.importorskip("torch")
    query, key, value = (torch.tensor(x, requires_grad=True) for x in INPUTS.values())
    table = torch.tensor(draw(7, D), requires_grad=True)
    out = []
    for i in range(T):
        embeddings = torch.stack([table[clip(j - i, 3)] for j in range(S)])
        keys = key.repeat_interleave(H // K, dim=2) + embeddings[None, :, None]
        weights = torch.einsum("bhd,bshd->bhs", query[:, i], keys).div(D**0.5).softmax(-1)
        out.append(torch.einsum("bhs,bshd->bhd", weights, value.repeat_interleave(H // K, dim=2)))
    expected = torch.stack(out, 1)
    (expected * torch.tensor(LOSS[..., :-1])).sum().backward()

    def loss(query, key, value, table):
        out = attend(query, key, value, score=shaw(query, table))
        return (out * LOSS[..., :-1]).sum(), out

    arrays = [jnp.asarray(x.detach().numpy(), jnp.float32) for x in (query, key, value, table)]
    gradients, got = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    np.testing.assert_allclose(got, expected.detach(), rtol=1e-4, atol=1e-5)
    for gradient, leaf in zip(gradients, (query, key, value, table), strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-4)
