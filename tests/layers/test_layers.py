import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.layers import LayerNormConfig, RMSNormConfig
from attnlab.layers.linear import Dropout, Dtypes, Embedding, Linear, look_up
from attnlab.layers.position_wise import ACTIVATIONS, GatedMLPConfig, MLPConfig, gelu
from attnlab.sharding import BATCH_AXES

RNG = np.random.default_rng(0)
F32 = Dtypes()


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def test_gelu_matches_jax():
    x = jnp.linspace(-9, 9, 301)

    def value_and_grad(f):
        return jax.vmap(jax.value_and_grad(f))(x)

    expected = value_and_grad(lambda x: jax.nn.gelu(x, approximate=True))
    for a, b in zip(value_and_grad(gelu), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    assert jax.grad(lambda x: gelu(x).astype(jnp.float32))(jnp.bfloat16(0.3)).dtype == jnp.bfloat16


def test_activations_match_definitions():
    x = jnp.array([-1.3, 0.0, 2.1])
    exact = jax.scipy.special.ndtr(x) * x
    np.testing.assert_allclose(ACTIVATIONS["gelu_exact"](x), exact, rtol=1e-5)
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + jnp.exp(-x)), rtol=1e-5)
    np.testing.assert_array_equal(ACTIVATIONS["relu"](x), x * (x > 0))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_matches_einsum(bias):
    cases = [
        (((6,), (2, 3), ("embed", "heads", "head_dim")), "bte,ehd->bthd"),
        (((2, 3), (6,), ("heads", "head_dim", "embed")), "bthd,hde->bte"),
    ]
    for (inputs, outputs, axes), formula in cases:
        module = Linear(inputs, outputs, axes, 0.5, bias, F32)
        x = normal(2, 5, *inputs)
        params = module.init(jax.random.key(0), x)["params"]
        assert set(params) == ({"kernel", "bias"} if bias else {"kernel"})
        expected = jnp.einsum(formula, x, params["kernel"])
        if bias:
            assert (params["bias"] == 0).all()
            params["bias"] = normal(*outputs)
            expected += params["bias"][None, None]
        np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_linear_initial_std():
    params = Linear((64,), (64,), ("embed", "mlp"), 0.3, False, F32).init(
        jax.random.key(0), jnp.ones((1, 1, 64))
    )
    kernel = params["params"]["kernel"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.3], atol=0.02)


def test_feed_forward_matches_equations():
    x = normal(1, 3, 4)
    module = MLPConfig(activation="relu").build(0.5, 0.5, F32)
    p = module.init(jax.random.key(0), x)["params"]
    assert p["up"]["kernel"].shape == (4, 16)
    expected = jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": p}, x), expected, rtol=1e-5, atol=1e-6)
    module = GatedMLPConfig().build(0.5, 0.5, F32)
    p = module.init(jax.random.key(0), x)["params"]
    assert p["up"]["kernel"].shape == (4, 16) and GatedMLPConfig().hidden(48) == 128
    expected = (jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": p}, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [RMSNormConfig(), LayerNormConfig(), LayerNormConfig(bias=False)])
def test_norms_normalise_large_inputs(config):
    x = 1e3 * normal(2, 3, 8) + 50
    module = config.build(F32)
    params = module.init(jax.random.key(0), x)
    y = module.apply(params, x)
    np.testing.assert_allclose(jnp.mean(y * y, -1), 1, rtol=1e-4)
    if isinstance(config, LayerNormConfig):
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    assert ("bias" in params["params"]) == (config == LayerNormConfig())


def test_rms_norm_computes_bfloat16_in_float32():
    x = normal(1, 1, 64, dtype=jnp.bfloat16)
    module = RMSNormConfig().build(Dtypes(compute="bfloat16"))
    y = module.apply(module.init(jax.random.key(0), x), x)
    exact = x.astype(jnp.float32)
    exact = exact / jnp.sqrt(jnp.mean(exact**2) + 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("config", [RMSNormConfig(), LayerNormConfig()])
def test_norms_keep_their_parameters_in_float32(config):
    x, params = normal(1, 64, 32, dtype=jnp.bfloat16), {"scale": normal(32), "bias": normal(32)}
    got = config.build(Dtypes(compute="bfloat16")).apply({"params": params}, x)
    y, scale, bias = (np.asarray(a, np.float64) for a in (x, params["scale"], params["bias"]))
    if isinstance(config, RMSNormConfig):
        bias = 0
    else:
        y = y - y.mean(-1, keepdims=True)
    expected = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + config.epsilon) * scale + bias
    differ = np.asarray(got) != expected.astype(jnp.bfloat16)
    assert differ.mean() < 0.01  # ties of rounding; 29% differ with a rounded scale


@pytest.mark.parametrize("config", [RMSNormConfig(), LayerNormConfig()])
@pytest.mark.parametrize(
    "mesh, partition",
    [("fsdp:8", P("fsdp")), ("data:1,fsdp:2,tensor:2,sequence:2", P("fsdp", "sequence", "tensor"))],
)
def test_devices_add_up_gradients_of_norms_in_the_compute_dtype(config, mesh, partition):
    """Each device adds up its own 1,024 rows in float32; the sums are rounded and added up."""
    x, g = normal(8, 512, 2, 16, dtype=jnp.bfloat16), normal(8, 512, 2, 16, dtype=jnp.bfloat16) + 1
    module = config.build(Dtypes(compute="bfloat16"))
    params = module.init(jax.random.key(0), x)
    mesh = sharding.make_mesh(sharding.parse_mesh(mesh, 8))
    placement = jax.NamedSharding(mesh, partition)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(lambda params, x, g: jnp.sum(module.apply(params, x) * g)))
        step = step.lower(params, jax.device_put(x, placement), jax.device_put(g, placement)).compile()
        got = step(params, jax.device_put(x, placement), jax.device_put(g, placement))["params"]

    y, d_out = (np.asarray(a, np.float64) for a in (x, g))
    if isinstance(config, LayerNormConfig):
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + config.epsilon)
    shards = placement.devices_indices_map(x.shape).values()
    for name, rows in {"scale": d_out * y, "bias": d_out}.items():
        if name not in got:
            continue
        of_devices = np.stack([rows[shard].sum((0, 1, 2)) for shard in shards])
        error = np.abs(np.asarray(got[name]) - of_devices.sum(0))
        assert (error <= 2 * 2**-8 * np.abs(of_devices).sum(0)).all(), name
    # The CPU widens a sum of bfloat16 to float32, and says so.
    sums = re.findall(r"f32\[16\].* all-reduce\(.*to_apply=%(\S*)", step.as_text())
    assert sums and all("promoted" in name for name in sums), sums


@pytest.mark.parity
def test_norms_match_torch():
    torch = pytest.importorskip("torch")
    x, scale, bias = normal(2, 3, 8), normal(8), normal(8)
    tensors = [torch.tensor(np.asarray(a)) for a in (x, scale, bias)]
    got = LayerNormConfig().build(F32).apply({"params": {"scale": scale, "bias": bias}}, x)
    expected = torch.nn.functional.layer_norm(tensors[0], (8,), tensors[1], tensors[2], eps=1e-5)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)
    got = RMSNormConfig().build(F32).apply({"params": {"scale": scale}}, x)
    expected = torch.nn.functional.rms_norm(tensors[0], (8,), tensors[1], eps=1e-6)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_linear_separates_param_and_compute_dtypes():
    dtypes = Dtypes(param="float32", compute="bfloat16")
    module = Linear((4,), (3,), ("embed", "mlp"), 0.5, True, dtypes)
    params = module.init(jax.random.key(0), jnp.ones((1, 1, 4), jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply(params, jnp.ones((1, 1, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="compute dtype"):
        Dtypes(compute="int8")


def test_look_up_returns_table_rows():
    module = Embedding(7, 3, ("vocab", "embed"), 1.0, F32)
    params = module.init(jax.random.key(0))
    ids = jnp.array([[6, 0], [3, 3]])
    got = look_up(module.apply(params), ids)
    np.testing.assert_array_equal(got, params["params"]["table"][np.asarray(ids)])


@pytest.mark.parametrize("text", ["single", "data:2,fsdp:2,tensor:2"])
def test_dropout_on_mesh_repeats_single_device(mesh_of, text):
    mesh = mesh_of(text)
    module = Dropout(0.3)
    rngs = {"dropout": jax.random.key(0)}
    expected = module.apply({}, jnp.ones((8, 16, 16)), False, rngs=rngs)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 16, 16)), jax.NamedSharding(mesh, jax.P(BATCH_AXES)))
        got = module.apply({}, x, False, rngs=rngs)
        assert jax.typeof(got).sharding == jax.typeof(x).sharding
        assert module.apply({}, x, True) is x
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose((got == 0).mean(), 0.3, atol=0.05)
    got = np.asarray(got)
    np.testing.assert_allclose(got[got != 0], 1 / 0.7, rtol=1e-6)
