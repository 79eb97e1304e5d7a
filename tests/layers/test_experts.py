"""Mixture of experts: compared with a loop and a dense sum, on meshes, and in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.layers import AttentionConfig, Dtypes, ExpertsConfig
from attnlab.layers.experts import Experts, balance_loss, clamped_swiglu, route
from attnlab.models import DecoderConfig
from attnlab.sharding import constrain
from attnlab.train import AdamW, Constant
from tests.selection import sample
from tests.train.small import make_experiment, make_session, random_batch
from tests.train.test_sharding_step import collectives

CASES = {
    "two of four": ExpertsConfig(4, 2, width=12),
    "shares of all": ExpertsConfig(4, 2, width=12, renormalize=False),
    "one": ExpertsConfig(4, 1, width=12, renormalize=False),
    "all": ExpertsConfig(4, 4, width=12),
    "biases, clamped": ExpertsConfig(4, 3, width=12, bias=True, activation="clamped_swiglu"),
}
EMBED, MESH = 8, "fsdp:2,expert:2,tensor:2"


def started(config, seed=0):
    """Return the layer, parameters large enough to reach every clamp, and activations (B, T, E)."""
    layer, rng = Experts(config, 0.5, 0.5, Dtypes()), np.random.default_rng(seed)
    x = jnp.asarray(3 * rng.normal(size=(4, 6, EMBED)), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, jnp.ones((4, 6), bool))["params"]
    return layer, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes), x


def by_loop(config, params, x):
    """Compute the layer token by token and expert by expert, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        token = np.asarray(x[at], np.float64)

        def linear(name, expert, y):
            return y @ p[name]["kernel"][expert] + (p[name]["bias"][expert] if config.bias else 0)

        logits = token @ p["router"]["kernel"] + (p["router"]["bias"] if config.bias else 0)
        selected = sorted(range(config.experts), key=lambda i: -logits[i])[: config.top_k]
        normalized_over = selected if config.renormalize else range(config.experts)
        total = sum(np.exp(logits[i]) for i in normalized_over)
        for i in selected:
            gate, up = linear("gate", i, token), linear("up", i, token)
            if config.activation == "clamped_swiglu":
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
                hidden = gate / (1 + np.exp(-1.702 * gate)) * up
            else:
                hidden = gate / (1 + np.exp(-gate)) * up
            out[at] += np.exp(logits[i]) / total * linear("down", i, hidden)
    return out


@pytest.mark.parametrize("name", CASES)
def test_experts_match_loop(name):
    layer, params, x = started(CASES[name])
    got = layer.apply({"params": params}, x, jnp.ones(x.shape[:2], bool))
    want = by_loop(CASES[name], params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def dense(config, params, x):
    """Compute the layer as a dense sum over all experts, without sorting or ragged products."""

    def linear(name, y, into):
        out = jnp.einsum(into, y, params[name]["kernel"])
        return out + params[name]["bias"][None, None] if config.bias else out

    weights, choices = route(linear("router", x, "bte,ex->btx"), config.top_k, config.renormalize)
    share = jnp.einsum("btk,btkx->btx", weights, jax.nn.one_hot(choices, config.experts))
    gate, up = linear("gate", x, "bte,xef->btxf"), linear("up", x, "bte,xef->btxf")
    clamped = config.activation == "clamped_swiglu"
    y = linear("down", clamped_swiglu(gate, up) if clamped else jax.nn.silu(gate) * up, "btxf,xfe->btxe")
    return jnp.einsum("btx,btxe->bte", share, y)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["none", "tensor:4", MESH, "data:2,expert:2,sequence:2"])
@pytest.mark.parametrize("name", sample(CASES, every=2))
def test_experts_match_dense_sum_on_meshes(name, text, mesh_of):
    config = CASES[name]
    layer, params, x = started(config)
    cotangent = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(function, params, x, cotangent):
        return jnp.sum(function(params, x) * cotangent)

    def apply(params, x):
        valid = jnp.ones_like(x[..., 0], bool)
        return layer.apply({"params": params}, x, valid)

    want = jax.value_and_grad(lambda p, x: loss(lambda p, x: dense(config, p, x), p, x, cotangent), (0, 1))(
        params, x
    )
    if text == "none":
        got = jax.value_and_grad(lambda p, x: loss(apply, p, x, cotangent), (0, 1))(params, x)
    else:
        with jax.set_mesh(mesh_of(text)):
            sharded = sharded_params(layer, params, x)
            x, cotangent = (constrain(a, "batch", "sequence", None) for a in (x, cotangent))
            step = jax.jit(jax.value_and_grad(lambda p, x: loss(apply, p, x, cotangent), (0, 1)))
            got = step(sharded, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def sharded_params(layer, params, x):
    """Return the parameters, sharded over the current mesh."""
    x = constrain(x, "batch", "sequence", None)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, jnp.ones_like(x[..., 0], bool))["params"]
    return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), params, shapes)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("tensor:4", [("all-reduce", (4, 6, EMBED))]),
        (
            "expert:4",
            [
                *(("all-gather", shape) for shape in ((4, 6, 2), (4, 6, 2), (4, 6, EMBED))),
                ("reduce-scatter", (1, 6, EMBED)),
            ],
        ),
    ],
)
def test_experts_are_not_gathered(mesh_of, mesh, expected):
    """Devices keep their own experts, or their part of the width: only activations are sent."""
    layer, params, x = started(CASES["two of four"])
    with jax.set_mesh(mesh_of(mesh)):
        sharded = sharded_params(layer, params, x)
        assert sharded["up"]["kernel"].sharding.spec == P("expert", "fsdp", "tensor")
        assert sharded["down"]["kernel"].sharding.spec == P("expert", "tensor", "fsdp")
        x = constrain(x, "batch", "sequence", None)
        valid = jnp.ones_like(x[..., 0], bool)
        text = jax.jit(layer.apply).lower({"params": sharded}, x, valid).compile().as_text()
    assert sorted((c.kind, c.shape) for c in collectives(text)) == expected


def test_balance_loss_is_minimal_for_uniform_routing():
    even = jnp.eye(4)[None]
    valid = jnp.ones((1, 4), bool)
    np.testing.assert_allclose(balance_loss(0 * even, route(even, 1, False)[1], valid), 1.0, rtol=1e-6)
    one = jnp.zeros((1, 4, 4)).at[:, :, 2].set(9.0)
    assert balance_loss(one, route(one, 1, False)[1], valid) > 3.9
    padded = one.at[:, 1:].set(even[:, 1:])
    first_only = jnp.arange(4)[None] == 0
    np.testing.assert_allclose(
        balance_loss(padded, route(padded, 1, False)[1], first_only),
        balance_loss(one, route(one, 1, False)[1], valid),
        rtol=1e-6,
    )


def trained(balance):
    """Return losses and balance losses of 20 training steps on a mesh, with scan and remat.

    The initial routers prefer one expert.
    """
    experts = ExpertsConfig(4, 2, width=16, bias=True, balance_loss_weight=balance)
    model = {"feed_forward": experts, "remat": "full", "attention": AttentionConfig(4, 2)}
    optimizer = AdamW(learning_rate=0.02, schedule=Constant(), weight_decay=0.0)
    run = make_session(make_experiment(model=model, optimizer=optimizer), MESH)
    state, batch = run.new_state(), run.to_devices(random_batch())
    router = state.params["layers"]["periods"]["block0"]["feed_forward"]["router"]
    uneven = jnp.broadcast_to(jnp.array([2.0, 0.0, 0.0, 0.0]), router["bias"].shape)
    router["bias"] = jax.device_put(uneven, router["bias"].sharding)
    losses, imbalance = [], []
    for _ in range(20):
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"]))
        imbalance.append(float(metrics["balance"]) / balance)
    return losses, imbalance


@pytest.mark.long
def test_experts_training_on_mesh_balances_routing():
    """A larger weight of the balance loss balances the routing in fewer steps."""
    losses, imbalance = trained(0.1)
    assert losses[-1] < losses[0] - 0.5
    assert imbalance[-1] < imbalance[0] - 0.2
    assert imbalance[-1] < trained(1e-6)[1][-1] - 0.1


def test_balance_loss_has_same_weight_with_microbatches():
    model = {"feed_forward": ExpertsConfig(4, 2, width=16, balance_loss_weight=0.1)}
    metrics = []
    for count in (1, 2):
        run = make_session(make_experiment(model=model, microbatches=count))
        _, step_metrics = run.train_step(run.new_state(), run.to_devices(random_batch()))
        metrics.append(step_metrics)
    np.testing.assert_allclose(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-5)
    # The balance loss is per microbatch, so it differs slightly.
    np.testing.assert_allclose(metrics[0]["balance"], metrics[1]["balance"], rtol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k=9 must be at least 1 and at most experts=8"),
        ({"top_k": 1}, "renormalize with top_k=1"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight=-1.0 must be at least 0"),
    ],
)
def test_experts_config_rejects_invalid_values(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**fields)


def test_mesh_must_divide_number_of_experts(refuses):
    model = {"feed_forward": ExpertsConfig(3, 2, width=16)}
    with refuses("model.feed_forward.experts=3 cannot be sharded 2 ways", "a multiple of 2, or expert of 1"):
        make_session(make_experiment(model=model), "expert:2")
    model = {"feed_forward": ExpertsConfig(4, 2, width=15)}
    with refuses("model.feed_forward.width=15 cannot be sharded 2 ways over mesh axes tensor"):
        make_session(make_experiment(model=model), "tensor:2")


def test_flops_and_active_parameters_count_selected_experts_only():
    few = DecoderConfig(
        depth=2, width=16, attention=AttentionConfig(4), feed_forward=ExpertsConfig(8, 2, width=16)
    )
    many = dataclasses.replace(few, feed_forward=ExpertsConfig(16, 2, width=16))
    router = 2.0 * 2 * 8 * 16
    assert many.token_flops(99, 8).weights - few.token_flops(99, 8).weights == router
    assert many.inactive_expert_params() - few.inactive_expert_params() == 2 * 8 * 3 * 16 * 16
