import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.config.types import short_name
from attnlab.models.recurrent import GRUConfig, LSTMConfig, RecurrentConfig
from attnlab.sharding import BATCH_AXES
from tests.generation.models import padded, search
from tests.generation.test_generate import GREEDY, by_full_forwards, generator

VOCAB = 13
SMALL = RecurrentConfig(depth=2, width=8, cell=LSTMConfig(forget_bias=0.5))
CONFIGS = {"lstm": SMALL, "gru": replace(SMALL, depth=3, cell=GRUConfig(), tied=False)}


def tokens_of(b=2, t=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (b, t)), jnp.int32)


@cache
def start(config, scale=0.5):
    """Return the model and random parameters, large enough for states far from 0."""
    model, rng = config.build(VOCAB), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_of())["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes)


@partial(jax.jit, static_argnums=0)
def forward(model, params, *args, cache=None):
    return model.apply({"params": params}, *args, cache=cache)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_outputs(cell, params, x):
    """Return the last layer's outputs for embeddings (T, E) of one text, in float64."""
    layers = params["layers"]["periods"]["forward"]
    for layer in range(len(layers["input"]["kernel"])):
        w = jax.tree.map(lambda p, layer=layer: np.asarray(p[layer], np.float64), layers)
        h, c, outputs = np.zeros(x.shape[1]), np.zeros(x.shape[1]), []
        for token in x:
            gates = np.split(token @ w["input"]["kernel"] + w["input"]["bias"], cell.gates)
            recurrent = np.split(h @ w["state"]["kernel"], cell.gates)
            if isinstance(cell, LSTMConfig):
                i, f, g, o = (a + b for a, b in zip(gates, recurrent, strict=True))
                c = sigmoid(f + cell.forget_bias) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            else:
                r, z = (sigmoid(a + b) for a, b in zip(gates[:2], recurrent[:2], strict=True))
                h = (1 - z) * np.tanh(gates[2] + r * (recurrent[2] + w["state"]["bias"])) + z * h
            outputs.append(h)
        x = np.stack(outputs)
    return x


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_equations(name):
    config, tokens = CONFIGS[name], tokens_of()
    model, params = start(config)
    table = np.asarray(params["embedding"]["table"], np.float64)
    readout = np.asarray(params["embedding" if config.tied else "readout"]["table"], np.float64)
    got = forward(model, params, tokens)
    for row, text in zip(got, np.asarray(tokens), strict=True):
        np.testing.assert_allclose(
            row, reference_outputs(config.cell, params, table[text]) @ readout.T, atol=1e-5
        )


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_recurrent_outputs_and_gradients_match_torch(name):
    torch = pytest.importorskip("torch")
    config, tokens = CONFIGS[name], tokens_of()
    model, params = start(config)
    torch_module = getattr(torch.nn, short_name(type(config.cell)))(8, 8, config.depth, batch_first=True)
    layers = params["layers"]["periods"]["forward"]
    with torch.no_grad():
        for i in range(config.depth):
            weights = {
                "weight_ih": layers["input"]["kernel"][i].T,
                "weight_hh": layers["state"]["kernel"][i].T,
                "bias_ih": layers["input"]["bias"][i],
                "bias_hh": np.zeros(8 * config.cell.gates),
            }
            if isinstance(config.cell, LSTMConfig):
                weights["bias_hh"][8:16] = config.cell.forget_bias
            else:
                weights["bias_hh"][16:] = layers["state"]["bias"][i]
            for key, value in weights.items():
                getattr(torch_module, f"{key}_l{i}").copy_(torch.tensor(np.array(value)))
    x = params["embedding"]["table"][tokens]
    expected, _ = torch_module(torch.tensor(np.array(x)))
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    @jax.jit
    def loss(params):
        x = model.apply({"params": params}, tokens, method="hidden")
        return jnp.sum(x * cotangent), x

    gradients, got = jax.grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)
    layers = gradients["layers"]["periods"]["forward"]
    for i in range(config.depth):
        torch_gradients = {
            k: getattr(torch_module, f"{k}_l{i}").grad.numpy()
            for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        np.testing.assert_allclose(layers["input"]["kernel"][i].T, torch_gradients["weight_ih"], atol=1e-4)
        np.testing.assert_allclose(layers["state"]["kernel"][i].T, torch_gradients["weight_hh"], atol=1e-4)
        np.testing.assert_allclose(layers["input"]["bias"][i], torch_gradients["bias_ih"], atol=1e-4)
        if "bias" in layers["state"]:
            np.testing.assert_allclose(layers["state"]["bias"][i], torch_gradients["bias_hh"][16:], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_and_padding_do_not_change_logits(name):
    model, params = start(CONFIGS[name])
    a, b = tokens_of(1, 3), tokens_of(1, 4, seed=1)
    row = jnp.concatenate([tokens_of(1, 2, seed=2), a, b, tokens_of(1, 2, seed=3)], axis=1)
    segments = jnp.array([[0] * 2 + [1] * 3 + [2] * 4 + [0] * 2])
    positions = jnp.array([[0, 0, *range(3), *range(4), 0, 0]])
    packed = forward(model, params, row, segments, positions)
    np.testing.assert_allclose(packed[:, 2:5], forward(model, params, a), atol=1e-6)
    np.testing.assert_allclose(packed[:, 5:9], forward(model, params, b), atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_chunks_repeat_full_forward(name):
    model, params = start(CONFIGS[name])
    tokens, (rows, segments) = (
        tokens_of(2, 7),
        padded([*map(list, np.asarray(tokens_of(1, 7))), [5, 3, 1, 2]]),
    )
    whole = forward(model, params, tokens), forward(model, params, jnp.array([[5, 3, 1, 2]]))
    cache, parts = model.init_cache(2, 0), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        out, cache = forward(model, params, rows[:, part], segments[:, part], cache=cache)
        parts.append(out)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[0], whole[0][0], atol=1e-6)
    np.testing.assert_allclose(got[1, 3:], whole[1][0], atol=1e-6)


def test_greedy_generation_matches_full_forwards(mesh_of):
    config, prompts = RecurrentConfig(depth=1, width=48, cell=GRUConfig(), tied=False), ["abcdefgh", "de"]
    g, on_mesh = generator(mesh_of("single"), config), generator(mesh_of("data:2,fsdp:2,tensor:2"), config)
    rows = g(prompts, max_new_tokens=8, sampling=GREEDY)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = by_full_forwards(g, prompt, 8)
        assert row.tokens == expected[: len(row.tokens)] and len(set(expected)) > 2
    assert on_mesh(prompts, max_new_tokens=8, sampling=GREEDY) == rows


def test_beam_search_gathers_states():
    """The score of each beam is the mean log-probability of its tokens in a forward pass."""
    model, params = start(CONFIGS["lstm"])
    for text, score in search(model, params, [[3, 1, 4]], 5, 3)[0]:
        logits = np.asarray(forward(model, params, jnp.array([[3, 1, 4, *text]])), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        mean = np.mean([log_probs[2 + i, token] for i, token in enumerate(text)])
        np.testing.assert_allclose(score, mean, rtol=1e-5)


def run(config, tokens):
    """Return initial parameters, logits, and loss and gradients with dropout."""
    model = config.build(16)
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        stats = model.apply(
            {"params": params}, tokens, tokens, deterministic=False, method="loss_terms", rngs=rngs
        )
        return jnp.mean(stats.lse - stats.target_logit)

    return params, model.apply({"params": params}, tokens), jax.value_and_grad(loss)(params)


@pytest.mark.long
def test_mesh_scan_and_remat_do_not_change_gradients(mesh_of):
    config, tokens = replace(CONFIGS["gru"], depth=2, dropout=0.2), tokens_of(8, 3)
    expected = jax.jit(partial(run, config))(tokens)
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        sharded_tokens = jax.device_put(tokens, jax.P(BATCH_AXES, None))
        got = jax.jit(partial(run, config))(sharded_tokens)
        layer = got[0]["layers"]["periods"]["forward"]
        assert layer["input"]["kernel"].sharding.spec == jax.P(None, "fsdp", None)
        assert layer["state"]["kernel"].sharding.spec == jax.P(None, "fsdp", None)
        assert got[0]["readout"]["table"].sharding.spec == jax.P("tensor", "fsdp")
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got, expected)
    for change in ({"scan": False, "remat": "full"}, {"remat": "dots"}):
        jax.tree.map(close, jax.jit(partial(run, replace(config, **change)))(tokens), expected)


def test_recurrent_config_rejects_invalid_values(refuses):
    for change, message in [
        ({"depth": 0}, "at least 1"),
        ({"dropout": 1.0}, "under 1"),
        ({"std": 0.0}, "over 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
    with refuses("vocab_size=7", "13 tokens"):
        replace(SMALL, vocab_size=7).build(13)


def matmul_flops(jaxpr):
    """Count the FLOPs of the matrix products of a jaxpr, including every iteration of scans."""
    count = 0
    for equation in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(equation.params) if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        iterations = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        count += iterations * sum(matmul_flops(getattr(x, "jaxpr", x)) for x in inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            count += 2 * math.prod(sizes) * equation.outvars[0].aval.size
    return count


@pytest.mark.parametrize("name", CONFIGS)
def test_recurrent_flops_match_jaxpr(name):
    config, tokens = CONFIGS[name], tokens_of()
    model, params = start(config)
    program = jax.make_jaxpr(partial(model.apply, {"params": params}))(tokens)
    counted = config.token_flops(VOCAB, tokens.shape[1])
    assert counted.weights * tokens.size == matmul_flops(program.jaxpr) and counted.attention == 0
