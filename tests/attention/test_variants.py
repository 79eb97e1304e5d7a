from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.attention import attend, causal, segments
from attnlab.attention.variants import (
    differential,
    differential_factor,
    differential_init,
    gated,
    latent,
    latent_expanded,
    qk_norm,
    selective,
    talking_heads,
    value_residual,
)

B, T, H, K, D, DV = 2, 6, 4, 2, 5, 3
QUERY, KEY, VALUE = (B, T, H, D), (B, T, K, D), (B, T, K, DV)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def float64(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def check_gradients(function, oracle, arguments):
    """Check the gradient of each argument against finite differences of `oracle`.

    The gradients are compared along one random direction per argument.
    """
    out = oracle(*float64(*arguments))
    weight, *along = float64(*normal(99, out.shape, *[x.shape for x in arguments]))
    gradients = jax.jit(jax.grad(lambda *xs: (function(*xs) * weight).sum(), tuple(range(len(arguments)))))(
        *arguments
    )
    for i, (gradient, direction) in enumerate(zip(gradients, along, strict=True)):
        high, low = (
            oracle(*(x + d * direction if i == j else x for j, x in enumerate(float64(*arguments))))
            for d in (1e-5, -1e-5)
        )
        slope = ((high - low) * weight).sum() / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def talking_loop(query, key, value, before, after):
    out = np.zeros((B, T, H, DV))
    for row, i, g in np.ndindex(B, T, H):
        for h in range(H):
            mixed = np.zeros(i + 1)
            for n in range(H):
                mixed += before[n, h] * (key[row, : i + 1, n // (H // K)] @ query[row, i, n]) / np.sqrt(D)
            out[row, i, g] += after[h, g] * softmax(mixed) @ value[row, : i + 1, g // (H // K)]
    return out


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_talking_heads_agree_with_a_loop(backend):
    arguments = normal(0, QUERY, KEY, VALUE, (H, H), (H, H))

    def run(*arguments):
        return talking_heads(*arguments, mask=causal(), backend=backend)

    expected = talking_loop(*float64(*arguments))
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)
    check_gradients(run, talking_loop, arguments)


def test_talking_heads_with_identity_matrices_match_attend():
    query, key, value = normal(1, QUERY, KEY, VALUE)
    kwargs = {"mask": causal(), "score": lambda s, b, h, q, k: s + 0.3 * h * (q - k)}
    actual = jax.jit(partial(talking_heads, **kwargs))(query, key, value, jnp.eye(H), jnp.eye(H))
    desired = jax.jit(partial(attend, **kwargs))(query, key, value)
    np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


def test_talking_heads_accepts_sharded_rows_and_rejects_sharded_heads(refuses, mesh_of):
    arguments = normal(2, QUERY, KEY, VALUE, (H, H), (H, H))

    @jax.jit
    def run(*arguments):
        return talking_heads(*arguments, mask=causal())

    with jax.set_mesh(mesh_of("data:2,tensor:2")):
        rows = [jax.reshard(x, P("data", None, None, None)) for x in arguments[:3]]
        actual = run(*rows, *arguments[3:])
        heads = [jax.reshard(x, P(None, None, "tensor", None)) for x in arguments[:3]]
        with refuses("talking_heads", "must not be sharded"):
            run(*heads, *arguments[3:])
    np.testing.assert_allclose(actual, run(*arguments), rtol=1e-5, atol=1e-6)


def layer_loop(query, key, value, first, gate, query_scale, key_scale, weights):
    """Attention with normalized queries and keys, a value residual and a gated output."""
    out = np.zeros((B, T, H, DV))
    for row, i, h in np.ndindex(B, T, H):
        n = h // (H // K)
        q, *keys = (x / np.sqrt((x @ x) / D + 1e-6) for x in (query[row, i, h], *key[row, : i + 1, n]))
        scores = (np.stack(keys) * key_scale) @ (q * query_scale) / np.sqrt(D)
        values = weights[0] * first[row, : i + 1, n] + weights[1] * value[row, : i + 1, n]
        out[row, i, h] = softmax(scores) @ values / (1 + np.exp(-gate[row, i, h]))
    return out


@pytest.mark.parametrize("width", [1, DV], ids=["a gate of each head", "a gate of each element"])
def test_qk_norm_value_residual_and_gate_match_loop(width):
    arguments = normal(3, QUERY, KEY, VALUE, VALUE, (B, T, H, width), (D,), (D,), (2,))

    def run(query, key, value, first, gate, query_scale, key_scale, weights):
        query, key = qk_norm(query, key, query_scale, key_scale)
        return gated(attend(query, key, value_residual(value, first, weights), mask=causal()), gate)

    expected = layer_loop(*float64(*arguments))
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)
    check_gradients(run, layer_loop, arguments)


def differential_loop(queries, keys, value, factor):
    out = np.zeros((B, T, H, DV))
    for row, i, h in np.ndindex(B, T, H):
        n = h // (H // K)
        signal, noise = (
            softmax(k[row, : i + 1, n] @ q[row, i, h] / np.sqrt(D))
            for q, k in zip(queries, keys, strict=True)
        )
        out[row, i, h] = (signal - factor * noise) @ value[row, : i + 1, n]
    return out


def test_differential_attention_agrees_with_a_loop():
    arguments = normal(5, (2, *QUERY), (2, *KEY), VALUE, ())

    def run(*arguments):
        return differential(*arguments, mask=causal())

    expected = differential_loop(*float64(*arguments))
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)
    check_gradients(run, differential_loop, arguments)


def test_differential_factor_agrees_with_its_equation():
    queries, keys = normal(6, (2, D), (2, D))

    def equation(queries, keys):
        (q1, q2), (k1, k2) = queries, keys
        return np.exp(q1 @ k1) - np.exp(q2 @ k2) + 0.2

    run = partial(differential_factor, init=0.2)
    np.testing.assert_allclose(run(queries, keys), equation(*float64(queries, keys)), rtol=1e-5)
    check_gradients(run, equation, (queries, keys))
    assert differential_init(0) == pytest.approx(0.2)
    assert differential_init(3) == pytest.approx(0.8 - 0.6 * np.exp(-0.9))


R, DC, DR = 7, 5, 2
LATENT = (B, T, H, DC), (B, T, H, DR), (B, T, R), (B, T, DR), (R, H, DC), (R, H, DV)


def latent_loop(query, rotated_query, cache, rotated_key, up_key, up_value):
    out = np.zeros((B, T, H, DV))
    for row, i, h in np.ndindex(B, T, H):
        scores = np.empty(i + 1)
        for j in range(i + 1):
            key = np.concatenate([up_key[:, h].T @ cache[row, j], rotated_key[row, j]])
            scores[j] = np.concatenate([query[row, i, h], rotated_query[row, i, h]]) @ key
        weights = softmax(scores / np.sqrt(DC + DR))
        for j in range(i + 1):
            out[row, i, h] += weights[j] * (up_value[:, h].T @ cache[row, j])
    return out


@pytest.mark.parametrize("form", [latent, latent_expanded])
def test_latent_attention_agrees_with_a_loop(form):
    arguments = normal(7, *LATENT)

    def run(*arguments):
        return form(*arguments, mask=causal())

    expected = latent_loop(*float64(*arguments))
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-4, atol=1e-5)
    check_gradients(run, latent_loop, arguments)


def test_latent_forms_agree_with_custom_scale():
    arguments = normal(8, *LATENT)
    forms = (jax.jit(partial(form, scale=0.7, mask=causal(-1))) for form in (latent, latent_expanded))
    actual, desired = (form(*arguments) for form in forms)
    np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)
    assert (actual[:, 0] == 0).all()


def selective_loop(query, key, value, allowed=None):
    allowed = np.tril(np.ones((B, T, T), bool)) if allowed is None else allowed
    out = np.zeros((B, T, H, DV))
    for row, i in np.ndindex(B, T):
        attended = np.flatnonzero(allowed[row, i])
        if not attended.size:
            continue
        reductions = np.zeros(T)
        for earlier in range(i):
            for j in range(1, earlier):
                if allowed[row, earlier, j]:
                    reductions[j] += max(0, query[row, earlier, 0] @ key[row, j, 0] / np.sqrt(D))
        for h in range(H):
            scores = key[row, attended, h // (H // K)] @ query[row, i, h] / np.sqrt(D) - reductions[attended]
            out[row, i, h] = softmax(scores) @ value[row, attended, h // (H // K)]
    return out


def test_selective_attention_agrees_with_a_loop():
    arguments = normal(9, QUERY, KEY, VALUE)
    expected = selective_loop(*float64(*arguments))
    np.testing.assert_allclose(jax.jit(selective)(*arguments), expected, rtol=1e-4, atol=1e-5)
    check_gradients(selective, selective_loop, arguments)
    plain = attend(*arguments, mask=causal())
    assert not np.allclose(expected, plain, atol=0.01)


def test_selective_attention_applies_mask():
    arguments = normal(10, QUERY, KEY, VALUE)
    documents = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
    allowed = (documents[:, :, None] == documents[:, None, :]) & (documents[:, None, :] > 0)
    loop = partial(selective_loop, allowed=allowed & np.tril(np.ones((T, T), bool)))
    run = partial(selective, mask=causal() & segments(jnp.asarray(documents)))
    np.testing.assert_allclose(jax.jit(run)(*arguments), loop(*float64(*arguments)), rtol=1e-4, atol=1e-5)
    check_gradients(run, loop, arguments)


def test_selective_attention_rejects_different_lengths(refuses):
    query, key, value = normal(11, (1, 2, 1, 3), (1, 4, 1, 3), (1, 4, 1, 3))
    with refuses("same sequence", "2", "4"):
        selective(query, key, value)


def test_qk_norm_matches_rms_norm_and_bounds_scores():
    query, key, scale = normal(12, QUERY, KEY, (D,))
    got = qk_norm(1e4 * query, key, scale, 2 * scale)
    for x, factor, actual in zip(float64(query, key), (1, 2), got, strict=True):
        root = np.sqrt((x**2).mean(-1, keepdims=True))
        np.testing.assert_allclose(actual, factor * np.asarray(scale) * x / root, rtol=1e-4)
    ones = jnp.ones(D)
    q, k = qk_norm(1e4 * query, 1e4 * key, ones, ones)
    assert jnp.abs(jnp.einsum("bthd,bshd->bhts", q[:, :, :K], k)).max() <= D * (1 + 1e-5)
