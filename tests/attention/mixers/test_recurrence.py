"""Mixers with a recurrent state: definition, chunks, segments, gradients, dtypes and sharding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.mixers import (
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    retention,
)

B, T, H, D, DV = 2, 11, 3, 4, 5
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3]])
CHUNKS = (None, 4, 64)


def arguments(name, length=T, dtype=np.float64):
    """Return random inputs of a mixer in the range in which its state stays bounded."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, length, H, n)) for n in (D, D, DV))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    gates = {
        "linear": (),
        "retention": (),
        "gla": (-rng.exponential(0.5, (B, length, H, D)),),
        "one_decay": (-rng.exponential(0.5, (B, length, H, 1)),),
        "delta": (-rng.exponential(0.5, (B, length, H)), rng.uniform(0, 2, (B, length, H))),
    }[name]
    return [np.asarray(x, dtype) for x in (query, key, value, *gates)]


MIXERS = {
    "linear": linear_attention,
    "retention": retention,
    "gla": gated_linear_attention,
    "one_decay": gated_linear_attention,
    "delta": gated_delta_rule,
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def output_as_sum(name, query, key, value, i, first):
    """Return output i as a sum over keys `first` to i, for mixers with weights in closed form."""
    if name == "linear":
        query, key = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (query, key))
    out = np.zeros((H, DV))
    for h in range(H):
        weights = np.array([query[i, h] @ key[j, h] for j in range(first, i + 1)])
        if name == "linear":
            weights = weights / weights.sum()
        else:
            weights = weights * (1 - 2.0 ** (-5 - h)) ** np.arange(i - first, -1, -1)
        out[h] = weights @ value[first : i + 1, h]
    return out


def loop(name, documents, query, key, value, *gates):
    """Evaluate the definition of a mixer token by token in NumPy."""
    out = np.zeros((B, query.shape[1], H, DV), query.dtype)
    for row in range(B):
        for i in range(query.shape[1]):
            starts = i == 0 or (documents is not None and documents[row, i] != documents[row, i - 1])
            first = i if starts else first
            if not gates:
                out[row, i] = output_as_sum(name, query[row], key[row], value[row], i, first)
                continue
            state = np.zeros((H, D, DV)) if starts else state
            decay = np.exp(gates[0][row, i])
            for h in range(H):
                q, k, v = query[row, i, h], key[row, i, h], value[row, i, h]
                if name == "delta":
                    b = gates[1][row, i, h]
                    transition = decay[h] * (np.eye(D) - b * np.outer(k, k))
                    state[h] = transition @ state[h] + b * np.outer(k, v)
                else:
                    state[h] = np.diag(np.broadcast_to(decay[h], D)) @ state[h] + np.outer(k, v)
                out[row, i, h] = q @ state[h]
    return out


@every_mixer
@pytest.mark.parametrize("chunk", CHUNKS)
def test_matches_definition(name, chunk):
    inputs = arguments(name)
    with jax.enable_x64():
        out, _ = jax.jit(partial(MIXERS[name], chunk=chunk))(*inputs)
        assert out.dtype == np.float64
    np.testing.assert_allclose(out, loop(name, None, *inputs), rtol=1e-10, atol=1e-10)


@every_mixer
@pytest.mark.parametrize("chunk", (None, 4))
def test_segments_reset_state(name, chunk):
    inputs = arguments(name)
    with jax.enable_x64():
        out, state = jax.jit(partial(MIXERS[name], chunk=chunk))(*inputs, segments=jnp.asarray(SEGMENTS))
        # The last state depends only on the last segment, tokens 8 to 10 of the first row.
        _, last = jax.jit(MIXERS[name])(*(x[:1, 8:] for x in inputs))
    np.testing.assert_allclose(out, loop(name, SEGMENTS, *inputs), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state[:1], last, rtol=1e-10, atol=1e-10)


@every_mixer
def test_gradients_match_definition_and_between_chunk_sizes(name):
    inputs = arguments(name)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(B, T, H, DV))
    argnums = tuple(range(len(inputs)))

    def gradients(chunk):
        def loss(*inputs):
            return (MIXERS[name](*inputs, segments=jnp.asarray(SEGMENTS), chunk=chunk)[0] * weight).sum()

        return jax.jit(jax.grad(loss, argnums))(*inputs)

    with jax.enable_x64():
        tokens, chunks = (list(map(np.asarray, gradients(chunk))) for chunk in (None, 4))
    for i, (x, a, b) in enumerate(zip(inputs, tokens, chunks, strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        along = rng.normal(size=x.shape)
        high, low = (
            loop(name, SEGMENTS, *(y + d * along if i == j else y for j, y in enumerate(inputs)))
            for d in (1e-6, -1e-6)
        )
        np.testing.assert_allclose((a * along).sum(), ((high - low) * weight).sum() / 2e-6, rtol=1e-6)


@every_mixer
def test_float32_accuracy(name):
    inputs = arguments(name)
    expected = loop(name, None, *inputs)
    for chunk in (None, 4):
        out, state = jax.jit(partial(MIXERS[name], chunk=chunk))(*(x.astype(np.float32) for x in inputs))
        assert out.dtype == state.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@every_mixer
def test_bfloat16_inputs_keep_float32_state(name):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arguments(name)]
    out, state = jax.jit(MIXERS[name])(*inputs)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected = loop(name, None, *(np.asarray(x, np.float64) for x in inputs))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-7, atol=2**-8)


@every_mixer
@pytest.mark.parametrize("chunk", (None, 4))
def test_continue_from_state(name, chunk):
    inputs = arguments(name, dtype=np.float32)
    run = jax.jit(partial(MIXERS[name], chunk=chunk))
    whole, last = run(*inputs)
    out, state = run(*(x[:, :6] for x in inputs))
    rest, end = run(*(x[:, 6:] for x in inputs), state=state)
    np.testing.assert_allclose(jnp.concatenate([out, rest], axis=1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gla", "one_decay", "delta"])
def test_strong_decay_does_not_overflow(name):
    query, key, value, log_decay, *gates = arguments(name, dtype=np.float32)
    inputs = query, key, value, 400 * log_decay, *gates
    expected = loop(name, None, *(np.asarray(x, np.float64) for x in inputs))

    def loss(*inputs):
        out, _ = MIXERS[name](*inputs, chunk=8)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_sharded_rows_and_heads(mesh_of):
    inputs = [jnp.asarray(x[:, :, :2], jnp.float32) for x in arguments("delta")]
    run = jax.jit(partial(gated_delta_rule, chunk=4))
    expected, _ = run(*inputs)
    with jax.set_mesh(mesh_of("data:2,tensor:2")):
        spec = [jax.P("data", None, "tensor", *[None] * (x.ndim - 3)) for x in inputs]
        sharded = [jax.reshard(x, s) for x, s in zip(inputs, spec, strict=True)]
        out, state = run(*sharded)
        assert jax.typeof(out).sharding.spec == jax.P("data", None, "tensor", None)
        assert jax.typeof(state).sharding.spec == jax.P("data", "tensor", None, None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_rejects_mismatched_shapes(refuses):
    x, decay = jnp.ones((1, 4, 2, 3)), jnp.zeros((1, 4, 2, 2))
    with refuses("gated_linear_attention", "per key dimension"):
        gated_linear_attention(x, x, x, decay)
    with refuses("gated_delta_rule", "equal batch, length and heads"):
        gated_delta_rule(x, x[:, :2], x, decay[..., 0], decay[..., 0])
    with refuses("chunk", "at least 1"):
        retention(x, x, x, chunk=0)
