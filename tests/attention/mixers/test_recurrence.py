"""Every mixer with a recurrent state: against its definition, in chunks, by segments, sharded."""

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
    """Random inputs of a form, of the sizes that it stays bounded for."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, length, H, n)) for n in (D, D, DV))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    more = {
        "linear": (),
        "retention": (),
        "gla": (-rng.exponential(0.5, (B, length, H, D)),),
        "one_decay": (-rng.exponential(0.5, (B, length, H, 1)),),
        "delta": (-rng.exponential(0.5, (B, length, H)), rng.uniform(0, 2, (B, length, H))),
    }[name]
    return [np.asarray(x, dtype) for x in (query, key, value, *more)]


FORMS = {
    "linear": linear_attention,
    "retention": retention,
    "gla": gated_linear_attention,
    "one_decay": gated_linear_attention,
    "delta": gated_delta_rule,
}
every_form = pytest.mark.parametrize("name", FORMS)


def by_sums(name, query, key, value, i, first):
    """Output i as a sum over the keys since `first`, of the forms whose weights are known beforehand."""
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


def loop(name, documents, query, key, value, *more):
    """Each form by its definition, one token after the other, in NumPy."""
    out = np.zeros((B, query.shape[1], H, DV), query.dtype)
    for row in range(B):
        for i in range(query.shape[1]):
            starts = i == 0 or (documents is not None and documents[row, i] != documents[row, i - 1])
            first = i if starts else first
            if not more:
                out[row, i] = by_sums(name, query[row], key[row], value[row], i, first)
                continue
            state = np.zeros((H, D, DV)) if starts else state
            decay = np.exp(more[0][row, i])
            for h in range(H):
                q, k, v = query[row, i, h], key[row, i, h], value[row, i, h]
                if name == "delta":
                    b = more[1][row, i, h]
                    turn = decay[h] * (np.eye(D) - b * np.outer(k, k))
                    state[h] = turn @ state[h] + b * np.outer(k, v)
                else:
                    state[h] = np.diag(np.broadcast_to(decay[h], D)) @ state[h] + np.outer(k, v)
                out[row, i, h] = q @ state[h]
    return out


@every_form
@pytest.mark.parametrize("chunk", CHUNKS)
def test_agrees_with_its_definition(name, chunk):
    inputs = arguments(name)
    with jax.enable_x64():
        out, _ = jax.jit(partial(FORMS[name], chunk=chunk))(*inputs)
        assert out.dtype == np.float64
    np.testing.assert_allclose(out, loop(name, None, *inputs), rtol=1e-10, atol=1e-10)


@every_form
@pytest.mark.parametrize("chunk", (None, 4))
def test_segments_start_anew(name, chunk):
    inputs = arguments(name)
    with jax.enable_x64():
        out, state = jax.jit(partial(FORMS[name], chunk=chunk))(*inputs, segments=jnp.asarray(SEGMENTS))
        _, last = jax.jit(FORMS[name])(
            *(x[:1, 8:] for x in inputs)
        )  # what is left is of the last segment alone
    np.testing.assert_allclose(out, loop(name, SEGMENTS, *inputs), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state[:1], last, rtol=1e-10, atol=1e-10)


@every_form
def test_gradients_agree_with_the_definition_and_between_forms(name):
    inputs = arguments(name)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(B, T, H, DV))
    every = tuple(range(len(inputs)))

    def gradients(chunk):
        def loss(*inputs):
            return (FORMS[name](*inputs, segments=jnp.asarray(SEGMENTS), chunk=chunk)[0] * weight).sum()

        return jax.jit(jax.grad(loss, every))(*inputs)

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


@every_form
def test_float32_is_as_good_as_its_rounding(name):
    inputs = arguments(name)
    expected = loop(name, None, *inputs)
    for chunk in (None, 4):
        out, state = jax.jit(partial(FORMS[name], chunk=chunk))(*(x.astype(np.float32) for x in inputs))
        assert out.dtype == state.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@every_form
def test_bfloat16_keeps_its_state_in_float32(name):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arguments(name)]
    out, state = jax.jit(FORMS[name])(*inputs)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected = loop(name, None, *(np.asarray(x, np.float64) for x in inputs))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-7, atol=2**-8)


@every_form
@pytest.mark.parametrize("chunk", (None, 4))
def test_a_state_goes_on_where_it_was_left(name, chunk):
    inputs = arguments(name, dtype=np.float32)
    run = jax.jit(partial(FORMS[name], chunk=chunk))
    whole, last = run(*inputs)
    out, state = run(*(x[:, :6] for x in inputs))
    more, end = run(*(x[:, 6:] for x in inputs), state=state)
    np.testing.assert_allclose(jnp.concatenate([out, more], axis=1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gla", "one_decay", "delta"])
def test_what_decays_at_once_does_not_overflow(name):
    query, key, value, log_decay, *more = arguments(name, dtype=np.float32)
    inputs = query, key, value, 400 * log_decay, *more
    expected = loop(name, None, *(np.asarray(x, np.float64) for x in inputs))

    def loss(*inputs):
        out, _ = FORMS[name](*inputs, chunk=8)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_rows_and_heads_may_be_sharded(mesh_of):
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


def test_refuses_shapes_that_do_not_fit(refuses):
    x, decay = jnp.ones((1, 4, 2, 3)), jnp.zeros((1, 4, 2, 2))
    with refuses("gated_linear_attention", "per key dimension"):
        gated_linear_attention(x, x, x, decay)
    with refuses("gated_delta_rule", "equal batch, length and heads"):
        gated_delta_rule(x, x[:, :2], x, decay[..., 0], decay[..., 0])
    with refuses("chunk", "at least 1"):
        retention(x, x, x, chunk=0)
