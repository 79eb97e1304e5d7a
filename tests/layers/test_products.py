"""Products in 8 bits: rounding errors, gradients, meshes, training and decoding."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import config as configs
from attnlab.layers import Dtypes, Linear
from attnlab.layers.products import quantized_product
from attnlab.sharding import BATCH_AXES
from attnlab.train import AdamW, Constant
from tests.train.small import make_experiment, make_session, random_batch
from tests.train.test_tpu import needs_libtpu, run_program

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3, 40)) * np.exp(RNG.normal(size=(6, 1, 1)))  # rows of different sizes
KERNEL = RNG.normal(size=(3, 40, 2, 5)) * np.exp(RNG.normal(size=(1, 1, 2, 5)))


def rounding_error(x, axes, products):
    """Return the largest error of rounding each element of x to 8 bits, scaled over the axes.

    int8: the largest magnitude is mapped to 127, and rounding errs by half a unit. fp8 e4m3: it is
    mapped to 448; 3 bits after the leading one err by 2^-4 of the value, and subnormal numbers,
    which are multiples of 2^-9, by 2^-10.
    """
    largest = np.abs(x).max(axis=axes, keepdims=True)
    if products == "int8":
        return np.broadcast_to(largest / 127 / 2, x.shape)
    return np.maximum(np.abs(x) / 16, largest / 448 / 1024)


@pytest.mark.parametrize("products", ["int8", "fp8"])
def test_error_is_within_that_of_rounding(products):
    x, kernel = (jnp.asarray(y, jnp.float32) for y in (X, KERNEL))
    got = np.asarray(quantized_product(x, kernel, 2, None, products), np.float64)
    error_x, error_kernel = rounding_error(X, (1, 2), products), rounding_error(KERNEL, (0, 1), products)
    # (x + a)(w + b) - x w = x b + a w + a b
    terms = (np.abs(X), error_kernel), (error_x, np.abs(KERNEL)), (error_x, error_kernel)
    bound = sum(np.einsum("nij,ijxy->nxy", a, b) for a, b in terms)
    error = np.abs(got - np.einsum("nij,ijxy->nxy", X, KERNEL))
    assert (error < 1.0001 * bound).all()
    assert error.max() > 0.01 * bound.max()


def test_rows_of_zeros_give_zero_and_nan_stays_nan():
    x = jnp.zeros((3, 4)).at[1, 2].set(jnp.nan)
    y = quantized_product(x, jnp.ones((4, 2)), 1, None, "int8")
    assert not y[0].any() and jnp.isnan(y[1]).all() and not y[2].any()


def test_gradients_are_those_of_the_exact_product():
    x, kernel = (jnp.asarray(y, jnp.float32) for y in (X, KERNEL))
    weights = jnp.asarray(RNG.normal(size=(6, 2, 5)), jnp.float32)

    def gradients(product):
        return jax.grad(lambda *y: jnp.sum(weights * product(*y)), (0, 1))(x, kernel)

    of_int8 = gradients(lambda x, w: quantized_product(x, w, 2, None, "int8"))
    exact = gradients(lambda x, w: jnp.einsum("nij,ijxy->nxy", x, w))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), of_int8, exact)


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_sharded_product_equals_that_of_one_device(mesh_of, axes):
    layer = Linear((16,), (8,), axes, 1.0, False, Dtypes(products="int8"))
    x = jnp.asarray(RNG.normal(size=(4, 6, 16)), jnp.float32)

    def run(x):
        y, variables = layer.init_with_output(jax.random.key(0), x)

        def loss(kernel, x):
            return jnp.sum(jnp.sin(layer.apply({"params": {"kernel": kernel}}, x)))

        return y, jax.grad(loss, (0, 1))(variables["params"]["kernel"], x)

    expected = jax.jit(run)(x)
    spec = jax.P(BATCH_AXES, "sequence", "tensor" if axes[0] == "mlp" else None)
    with jax.set_mesh(mesh := mesh_of("fsdp:2,sequence:2,tensor:2")):
        got = jax.jit(run)(jax.device_put(x, jax.NamedSharding(mesh, spec)))
    assert jax.typeof(got[0]).sharding.spec[2] == ("tensor" if axes[1] == "mlp" else None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


INT8 = {"dtypes": Dtypes(products="int8")}


@pytest.mark.slow
def test_decoder_trains_and_decodes_with_int8_products():
    optimizer = AdamW(learning_rate=1e-2, schedule=Constant(warmup=2))
    session = make_session(make_experiment(model=INT8, optimizer=optimizer))
    state, losses, batch = session.new_state(), [], session.to_devices(random_batch())
    for _ in range(20):
        state, metrics = session.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    tokens = jnp.asarray(random_batch().tokens[:2, :6])
    variables = {"params": jax.tree.map(jnp.asarray, jax.device_get(state.params))}
    apply = jax.jit(session.model.apply)
    whole, cache, parts = apply(variables, tokens), session.model.init_cache(2, 6), []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, cache = apply(variables, part, cache=cache)
        parts.append(logits)
    # Each row of a product has a scale of its own, so it does not depend on the other tokens.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-3, atol=1e-3)
    exact = replace(session.experiment.model, dtypes=Dtypes()).build(session.tokenizer.vocab_size)
    difference = jnp.abs(jax.jit(exact.apply)(variables, tokens) - whole).max()
    assert 0 < difference < 0.1 * jnp.abs(whole).max()


def test_qwix_that_is_missing_is_named_with_its_extra(refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    session = make_session(make_experiment(model=INT8))
    with refuses("dtypes.products=int8", "qwix", 'pip install "attnlab[quant]"'):
        _ = session.abstract_state


def test_unsupported_products_are_refused(refuses):
    e = make_experiment()
    with refuses("products must be compute, int8 or fp8, not int4"):
        configs.override(e, "model.dtypes.products", "int4")
    with refuses("dtypes.products=int8", "feed_forward=Experts"):
        configs.override_all(e, [("model.dtypes.products", "int8"), ("model.feed_forward", "Experts")])


TPU_PROGRAM = """
import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from attnlab.layers.products import quantized_product

device = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices[0]
one = jax.sharding.SingleDeviceSharding(device)
shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in ((512, 256), (256, 512))]
found = {}
for name, product in {
    "exact": jnp.matmul, "int8": lambda x, kernel: quantized_product(x, kernel, 1, None, "int8")
}.items():
    text = jax.jit(product).lower(*shapes).compile().as_text()
    # An operation with its operands' types, or a variable of the computation that it is in.
    types = dict(re.findall(r"(%[\\w.-]+) = (\\w+)\\[", text))
    found[name] = [
        [types.get(operand) for operand in re.findall(r"%[\\w.-]+", operands)[:2]]
        for operands in re.findall(r" convolution\\(([^)]*)\\)", text)
    ]
print(json.dumps(found))
"""


@pytest.mark.preflight
@needs_libtpu
def test_tpu_multiplies_int8():
    found = run_program(TPU_PROGRAM)
    assert ["s8", "s8"] in found["int8"]
    assert ["s8", "s8"] not in found["exact"] and found["exact"]
