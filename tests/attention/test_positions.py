import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.attention.positions import rotary, sinusoidal

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 8)), jnp.float32)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([0.25, 0.5, 0.8, 1.0]))
def test_products_depend_on_the_distance_alone(i, j, shift, fraction):
    def product(i, j):
        turned = [rotary(x, jnp.full((2, 3), at), fraction=fraction) for x, at in ((X, i), (X[::-1], j))]
        return (turned[0] * turned[1]).sum(-1)

    np.testing.assert_allclose(product(i, j), product(i + shift, j + shift), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_turns_its_fraction_and_keeps_the_norm(fraction):
    positions = jnp.array([[0, 3, 70], [5, 1, 9]])
    turned = rotary(X, positions, fraction=fraction)
    width = int(8 * fraction)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[..., width:], X[..., width:])
    np.testing.assert_array_equal(turned[0, 0], X[0, 0])
    assert (turned[1, 0, :, :width] != X[1, 0, :, :width]).all()


def test_bfloat16_is_turned_by_float32_angles():
    positions = jnp.full((2, 3), 1001)  # no bfloat16
    exact = rotary(X.astype(jnp.bfloat16).astype(jnp.float32), positions)
    got = rotary(X.astype(jnp.bfloat16), positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("width", [6, 5])
def test_sinusoidal_by_hand(width):
    got = sinusoidal(jnp.array([[0, 1, 7]]), width)
    assert got.shape == (1, 3, width)
    for t, position in enumerate((0, 1, 7)):
        for i in range(width):
            angle = position / 10_000 ** (i // 2 * 2 / width)
            np.testing.assert_allclose(got[0, t, i], [np.sin(angle), np.cos(angle)][i % 2], atol=1e-6)


@pytest.mark.parity
def test_parity_with_llama():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    positions = np.array([[0, 1, 2], [7, 100, 31]])
    frequencies = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = torch.tensor(np.tile(positions[..., None] * frequencies, 2), dtype=torch.float32)
    x = torch.tensor(np.asarray(X)).transpose(1, 2)
    expected, _ = llama.apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    got = rotary(X, jnp.asarray(positions))
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)
