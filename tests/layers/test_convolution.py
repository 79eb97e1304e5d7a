import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import InputError
from attnlab.layers.convolution import Convolution1d
from attnlab.layers.linear import Dtypes
from attnlab.sharding import BATCH_AXES

RNG = np.random.default_rng(0)
CASES = [(3, 1, 1), (3, 2, 1), (4, 3, 0), (1, 1, 2), (5, 2, 4)]  # taps, stride, padding


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def convolution(size, stride, padding, bias=True, axes=("window", "embed"), dtypes=None):
    return Convolution1d(6, 4, size, axes, 0.5, bias, dtypes or Dtypes(), stride, padding)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size, stride, padding", CASES)
def test_convolution_sums_over_taps(size, stride, padding, bias):
    module, x = convolution(size, stride, padding, bias), normal(2, 11, 6)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["kernel"].shape == (size, 6, 4) and ("bias" in params) == bias
    if bias:
        assert (params["bias"] == 0).all()
        params["bias"] = normal(4)
    kernel = np.asarray(params["kernel"], np.float64)
    expected = []
    for t in range((11 + 2 * padding - size) // stride + 1):
        y = np.zeros((2, 4)) + np.asarray(params.get("bias", 0))
        for k in range(size):
            at = stride * t + k - padding
            if 0 <= at < 11:
                y += np.asarray(x[:, at], np.float64) @ kernel[k]
        expected.append(y)
    got = module.apply({"params": params}, x)
    np.testing.assert_allclose(got, np.stack(expected, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("size, stride, padding", CASES)
def test_convolution_matches_torch(size, stride, padding):
    torch = pytest.importorskip("torch")
    torch_module = torch.nn.Conv1d(6, 4, size, stride, padding)
    module, x = convolution(size, stride, padding), normal(2, 11, 6)
    weight, bias = (p.detach().numpy() for p in torch_module.parameters())
    params = {"kernel": jnp.asarray(weight.transpose(2, 1, 0)), "bias": jnp.asarray(bias)}
    y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
    g = normal(*y.shape)
    torch_x = torch.tensor(np.asarray(x.transpose(0, 2, 1)), requires_grad=True)
    torch_y = torch_module(torch_x)
    torch_y.backward(torch.tensor(np.asarray(g.transpose(0, 2, 1))))
    np.testing.assert_allclose(y, torch_y.detach().numpy().transpose(0, 2, 1), rtol=1e-5, atol=1e-5)
    d_params, d_x = pull(g)
    np.testing.assert_allclose(d_x, torch_x.grad.numpy().transpose(0, 2, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        d_params["kernel"], torch_module.weight.grad.numpy().transpose(2, 1, 0), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(d_params["bias"], torch_module.bias.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [("window", "embed"), ("window", "mlp"), ("mlp", "embed"), ("embed", "mlp")])
def test_convolution_sharded_matches_single_device(mesh_of, axes):
    module, x = convolution(3, 2, 1, axes=axes), normal(8, 11, 6)

    def loss(params, x):
        y = module.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)), y

    params = module.init(jax.random.key(0), x)["params"] | {"bias": normal(4)}
    (_, expected), gradients = jax.value_and_grad(loss, has_aux=True)(params, x)
    mesh = mesh_of("data:2,fsdp:2,tensor:2")
    stored = {"window": None, "embed": "fsdp", "mlp": "tensor"}
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.P(BATCH_AXES, None, "tensor" if axes[0] == "mlp" else None))
        init = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        assert init["kernel"].sharding.spec == jax.P(None, *(stored[axis] for axis in axes))
        params = jax.tree.map(lambda p, like: jax.device_put(p, like.sharding.spec), params, init)
        (_, got), got_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
        where = jax.P(BATCH_AXES, None, "tensor" if axes[1] == "mlp" else None)
        assert jax.typeof(got).sharding.spec == where
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert got_gradients[name].sharding.spec == init[name].sharding.spec
        np.testing.assert_allclose(got_gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_convolution_computes_in_compute_dtype():
    module, x = convolution(3, 1, 1, dtypes=Dtypes(compute="bfloat16")), normal(1, 5, 6)
    params = module.init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply(params, x).dtype == jnp.bfloat16


def test_convolution_rejects_too_short_sequence():
    module = convolution(5, 1, 1)
    params = module.init(jax.random.key(0), normal(1, 3, 6))
    with pytest.raises(InputError, match="5 taps needs a length of at least 3, not 2"):
        module.apply(params, normal(1, 2, 6))
