"""Operations on arrays: RMSNorm, slices, and evaluation at trace time."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.arrays import eval_at_trace_time, rms_norm, slice_at


def test_rms_norm_agrees_with_float64_and_is_differentiable_at_zero():
    x, scale = 1e4 * jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.arange(1.0, 4.0)[:, None]
    wide = np.asarray(x, np.float64)
    expected = np.asarray(scale) * wide / np.sqrt((wide**2).mean((-2, -1), keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(x, scale, axes=(-2, -1)), expected, rtol=1e-5)
    rounded = rms_norm(x.astype(jnp.bfloat16), scale, axes=(-2, -1))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), expected, rtol=2**-7)
    gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(5)).sum())(jnp.zeros((2, 5)))
    assert jnp.isfinite(gradient).all()


def test_slices_accept_starts_of_different_integer_types():
    x = jnp.arange(12).reshape(3, 4)
    with jax.enable_x64(True):
        got = jax.jit(lambda i: slice_at(x, (i, np.int32(1)), (2, 2)))(jnp.int64(1))
    np.testing.assert_array_equal(got, [[5, 6], [9, 10]])


def test_evaluation_at_trace_time_returns_numpy_arrays_under_a_trace():
    mesh, seen = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)), []

    @jax.jit
    def run(x):
        seen.append(eval_at_trace_time(lambda: {"sum": jnp.arange(4).sum()}))
        return x

    with jax.set_mesh(mesh):
        run(jnp.ones(2))
    assert isinstance(seen[0]["sum"], np.ndarray) and seen[0]["sum"] == 6
