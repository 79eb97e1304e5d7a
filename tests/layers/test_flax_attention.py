"""`flax_attention_fn` in Flax's attention modules, against Flax's own `dot_product_attention`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import attnlab
from attnlab import flax_attention_fn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 8))


def arrays(*batch):
    return jax.random.normal(KEY, (3, *batch, 5, 2, 4))


def layers(attention_fn=flax_attention_fn, **options):
    """Return the same Linen module with Flax's function and with `attention_fn`."""
    make = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2, **options)
    return make(), make(attention_fn=attention_fn)


@pytest.mark.parametrize("module", [nn, nnx])
def test_signature_has_every_argument_of_flax(module):
    ours = inspect.signature(flax_attention_fn).parameters
    theirs = inspect.signature(module.dot_product_attention).parameters
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        if name != "promote_dtype":
            assert ours[name].default == parameter.default, name
    first = [name for name in theirs if theirs[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][:12]
    assert list(ours)[:12] == first
    with pytest.raises(AttributeError, match="no attribute 'flax_attention'"):
        attnlab.flax_attention  # noqa: B018


def options_of(case, batch):
    mask = nn.make_causal_mask(jnp.ones((*batch, 5)))  # float32, of 0 and 1
    row = jax.random.normal(KEY, (*batch, 1, 1, 5))
    bias = jax.random.normal(KEY, (*(1 for _ in batch), 2, 5, 5))
    return {
        "plain": {},
        "bias": {"mask": mask != 0, "bias": bias, "precision": "highest"},
        "row": {"mask": mask, "bias": row, "precision": jax.lax.Precision.HIGHEST},
        "dropout": {"dropout_rate": 0.4, "dropout_rng": KEY},
        "separate": {"dropout_rate": 0.4, "dropout_rng": KEY, "broadcast_dropout": False, "mask": mask},
        "half": {"dtype": jnp.bfloat16},
    }[case]


CASES = [(case, (3,)) for case in ("plain", "bias", "row", "dropout", "separate", "half")]


@pytest.mark.parametrize("case, batch", [*CASES, ("separate", ()), ("bias", (3, 2)), ("row", (3, 2))])
def test_function_agrees_with_flax(case, batch):
    options = options_of(case, batch)

    @jax.jit
    def both(x):
        def loss(x, function):
            out = function(*x, **options)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        functions = nn.dot_product_attention, flax_attention_fn
        return [jax.value_and_grad(loss, has_aux=True)(x, function) for function in functions]

    ((_, theirs), theirs_grad), ((_, ours), ours_grad) = both(arrays(*batch))
    assert ours.dtype == theirs.dtype
    tolerance = 0.05 if case == "half" else 2e-5
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance)
    np.testing.assert_allclose(ours_grad, theirs_grad, atol=tolerance)


def test_linen_module_keeps_its_dropout():
    """In float64: the gradient of the key's bias is 0, and in float32 only rounding errors."""
    flax, ours = layers(dropout_rate=0.4, dtype=jnp.float64, param_dtype=jnp.float64)
    rngs = {"dropout": jax.random.key(7)}

    def loss(params, layer):
        return jnp.sum(layer.apply(params, X, deterministic=False, rngs=rngs) ** 2)

    @jax.jit
    def run():
        params = flax.init(KEY, X, deterministic=True)
        dropped = [jax.value_and_grad(loss)(params, layer) for layer in (flax, ours)]
        return dropped, [layer.apply(params, X, deterministic=True) for layer in (flax, ours)]

    with jax.enable_x64(True):
        dropped, off = run()
    for theirs, got in zip(*map(jax.tree.leaves, dropped), strict=True):
        np.testing.assert_allclose(got, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(off[1], off[0], rtol=1e-5, atol=1e-6)
    assert abs(float(np.sum(np.square(off[1])) - dropped[1][0])) > 1e-3


def test_linen_module_sows_its_weights():
    flax, ours = layers()
    mask = nn.make_causal_mask(jnp.ones((2, 5)))

    @jax.jit
    def run():
        params = flax.init(KEY, X)
        options = {"mask": mask, "sow_weights": True, "mutable": ["intermediates"]}
        return [layer.apply(params, X, **options)[1] for layer in (flax, ours)]

    theirs, got = run()
    assert jax.tree.structure(got) == jax.tree.structure(theirs)
    np.testing.assert_allclose(*map(jax.tree.leaves, (got, theirs)), atol=1e-6)


def test_linen_module_decodes():
    flax, ours = layers(decode=True)

    @jax.jit
    def run():
        variables, outputs = flax.init(KEY, X), []
        for layer in (flax, ours):
            cache, steps = variables["cache"], []
            for i in range(3):
                inputs = {"params": variables["params"], "cache": cache}
                out, changed = layer.apply(inputs, X[:, i : i + 1], mutable=["cache"])
                cache = changed["cache"]
                steps.append(out)
            outputs.append(jnp.concatenate(steps, axis=1))
        return outputs

    theirs, got = run()
    np.testing.assert_allclose(got, theirs, rtol=1e-5, atol=1e-6)


def test_nnx_module_agrees_and_drops():
    def make(**options):
        return nnx.MultiHeadAttention(
            num_heads=2, in_features=8, decode=False, dropout_rate=0.4, rngs=nnx.Rngs(0), **options
        )

    flax, ours = make(), make(attention_fn=flax_attention_fn)
    causal = {"is_causal": True, "deterministic": True}
    np.testing.assert_allclose(ours(X, **causal), flax(X, **causal), rtol=1e-5, atol=1e-6)
    dropped = [layer(X, deterministic=False, rngs=nnx.Rngs(3)) for layer in (flax, ours)]
    np.testing.assert_allclose(dropped[1], dropped[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(dropped[1], ours(X, deterministic=True))
    for layer in (flax, ours):
        layer(X, deterministic=True, sow_weights=True)
    weights = [jax.tree.leaves(nnx.state(layer, nnx.Intermediate))[0] for layer in (flax, ours)]
    np.testing.assert_allclose(weights[1], weights[0], atol=1e-6)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_drops_the_given_fraction(broadcast):
    query, key, _ = jax.random.normal(KEY, (3, 4, 40, 2, 4))
    eye = jnp.broadcast_to(jnp.eye(40)[None, :, None], (4, 40, 2, 40))  # the output equals the weights
    options = {"dropout_rate": 0.3, "broadcast_dropout": broadcast, "dropout_rng": KEY}
    dropped = np.asarray(flax_attention_fn(query, key, eye, **options)) == 0
    np.testing.assert_allclose(dropped.mean(), 0.3, atol=0.05 if broadcast else 0.02)
    assert (dropped == dropped[:1, :, :1]).all() == broadcast
    assert (np.asarray(flax_attention_fn(query, key, eye, deterministic=True, **options)) > 0).all()


def test_dropout_without_a_key_and_other_einsums_are_rejected(refuses):
    x = arrays(3)
    with refuses("dropout_rate 0.1 needs a dropout_key"):
        flax_attention_fn(*x, dropout_rate=0.1)
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with refuses("einsum to replace"):
            flax_attention_fn(*x, **{name: jnp.einsum})
    with refuses("the same precision"):
        flax_attention_fn(*x, precision=("highest", "default"))
