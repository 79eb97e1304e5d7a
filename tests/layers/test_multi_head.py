"""Tests of attnlab/layers/multi_head.py, against Flax's own module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.attention as attn
from attnlab import sharding
from attnlab.layers import Attention, RMSNormConfig, Rotary

X = jax.random.normal(jax.random.key(0), (4, 6, 16))
Y = jax.random.normal(jax.random.key(1), (4, 5, 16))


def drawn(module, *inputs, **options):
    """Return parameters of order 1, also of the biases."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize(
    ("inputs", "mask"),
    [((X,), None), ((X,), "causal"), ((X, Y), None), ((X, Y, Y[..., ::-1]), "array"), ((X[None],), "array")],
    ids=["self", "causal", "cross", "values", "batches"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_flax_with_the_same_parameters(inputs, mask, bias):
    ours, flax = Attention(heads=4, bias=bias), nn.MultiHeadDotProductAttention(4, use_bias=bias)
    params = drawn(flax, *inputs)
    assert jax.tree.structure(params) == jax.tree.structure(drawn(ours, *inputs))
    *batch, t, _ = inputs[0].shape
    s = inputs[-1].shape[-2]
    array = jax.random.bernoulli(jax.random.key(2), 0.7, (*batch, 1, t, s)).at[..., 0].set(True)
    theirs = {None: None, "array": array, "causal": nn.make_causal_mask(X[..., 0], dtype=bool)}[mask]
    expected = flax.apply(params, *inputs, mask=theirs)
    got = ours.apply(params, *inputs, mask=attn.causal() if mask == "causal" else theirs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_options_are_those_of_attend():
    module = Attention(
        heads=4,
        kv_heads=2,
        head_dim=6,
        out_features=3,
        bias="qkv",
        qk_norm=RMSNormConfig(),
        rotary=Rotary(),
        softcap=2.0,
        scale=0.7,
        sinks=True,
    )
    positions = jnp.arange(6)[None] * 2
    options = {"mask": attn.window(2, 2), "score": attn.alibi(4), "positions": positions}
    params = drawn(module, X)
    p = params["params"]

    def project(name):
        y = jnp.einsum("bte,ehd->bthd", X, p[name]["kernel"]) + p[name]["bias"][None, None]
        if name == "value":
            return y
        y = y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
        return attn.rotary(y * p[f"{name}_norm"]["scale"][None, None, None], positions)

    heads = attn.attend(
        *map(project, ("query", "key", "value")),
        mask=attn.window(2, 2),
        score=[attn.alibi(4), attn.softcap(2.0)],
        scale=0.7,
        sinks=p["sinks"],
        backend="reference",
    )
    expected = jnp.einsum("bthd,hde->bte", heads, p["out"]["kernel"])
    assert "bias" not in p["out"]
    np.testing.assert_allclose(module.apply(params, X, **options), expected, rtol=1e-4, atol=1e-5)


def test_dropout_needs_deterministic_and_sown_weights_sum_to_1(refuses):
    module = Attention(heads=2, dropout=0.5)
    params = module.init(jax.random.key(0), X, deterministic=True)
    with refuses("pass deterministic=True or deterministic=False"):
        module.apply(params, X)
    rngs = {"dropout": jax.random.key(1)}
    dropped = module.apply(params, X, deterministic=False, rngs=rngs)
    kept, sown = module.apply(params, X, deterministic=True, mutable=["intermediates"])
    assert jnp.abs(dropped - kept).max() > 0.01
    (weights,) = sown["intermediates"]["attention_weights"]
    assert weights.shape == (4, 2, 6, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_wrong_arguments_are_refused(refuses):
    for module, inputs, message in (
        (Attention(heads=3), (X,), "heads=3 must divide the width 16"),
        (Attention(heads=4, kv_heads=3), (X,), "kv_heads must divide heads=4"),
        (Attention(heads=4), (X, None, X), "inputs_v needs inputs_k"),
    ):
        with refuses(message):
            module.init(jax.random.key(0), *inputs)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Attention(heads=2, name="attention")(x, mask=attn.causal())


class SetUp(nn.Module):
    def setup(self):
        self.attention = Attention(heads=2)

    def __call__(self, x):
        return self.attention(x, mask=attn.causal())


def test_works_in_compact_and_in_setup():
    params = drawn(Compact(), X)
    assert jax.tree.structure(params) == jax.tree.structure(drawn(SetUp(), X))
    np.testing.assert_array_equal(SetUp().apply(params, X), jax.jit(Compact().apply)(params, X))


def test_works_in_nnx():
    rngs = nnx.Rngs(0, dropout=1)
    module = nnx.bridge.ToNNX(Attention(heads=2, dropout=0.3), rngs=rngs).lazy_init(X, deterministic=True)
    params = {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    expected = Attention(heads=2).apply(params, X, mask=attn.causal())
    run = nnx.jit(lambda module, x: module(x, mask=attn.causal(), deterministic=True))
    np.testing.assert_allclose(run(module, X), expected, rtol=1e-5, atol=1e-6)
    assert jnp.abs(module(X, mask=attn.causal(), deterministic=False) - expected).max() > 1e-3


OWN = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("mesh", ["own", "explicit", "auto"])
def test_works_on_any_mesh(mesh):
    module = Attention(heads=4, bias=True, rotary=Rotary())
    params = drawn(module, X)

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply(params, x, mask=attn.causal())))

    expected = jax.grad(loss)(params, X)
    if mesh == "own":
        mesh, rows, columns, heads = sharding.make_mesh(OWN), ("data", "fsdp"), "fsdp", "tensor"
    else:
        kind = {"explicit": jax.sharding.AxisType.Explicit, "auto": jax.sharding.AxisType.Auto}[mesh]
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        rows, columns, heads = "x", "x", "y"
    inner = {"kernel": jax.P(columns, heads, None), "bias": jax.P(heads, None)}
    specs = dict.fromkeys(("query", "key", "value"), inner)
    specs["out"] = {"kernel": jax.P(heads, None, columns), "bias": jax.P(None)}
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, {"params": specs}
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P(rows)))
        jax.jit(module.init)(jax.random.key(0), x)
        got = jax.jit(jax.grad(loss))(placed, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
