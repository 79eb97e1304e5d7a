from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import attention_maps
from attnlab.layers import GRUConfig, LSTMConfig
from attnlab.layers.alignment import AdditiveConfig, DotConfig, GeneralConfig, NoAttention
from attnlab.models import RecurrentSeq2SeqConfig
from attnlab.sharding import BATCH_AXES
from tests.models.test_recurrent import VOCAB, matmul_flops, sigmoid, tokens_of
from tests.selection import long

SMALL = RecurrentSeq2SeqConfig(depth=2, width=8, cell=GRUConfig())
CONFIGS = {
    "none": replace(SMALL, attention=NoAttention(), bidirectional=False, cell=LSTMConfig(), tied=False),
    "additive": replace(SMALL, attention=AdditiveConfig(6)),
    "one additive layer": replace(SMALL, depth=1, cell=LSTMConfig(), attention=AdditiveConfig()),
    "general": replace(SMALL, attention=GeneralConfig()),
    "dot": replace(SMALL, attention=DotConfig(), cell=LSTMConfig(0.0)),
}
SOURCE = tokens_of(2, 6, seed=5)
SOURCE_SEGMENTS = jnp.array([[1] * 6, [1] * 4 + [0] * 2])
TOKENS = tokens_of(2, 5)


def start(config, scale=0.7):
    model, rng = config.build(VOCAB), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(model.init, source=SOURCE), jax.random.key(0), TOKENS)["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes)


@partial(jax.jit, static_argnums=0)
def forward(model, params, *args, **source):
    return model.apply({"params": params}, *args, **source)


def advance(cell, w, gates, state):
    """Return the state after one token by the equations; `gates` is W x + b."""
    h, *rest = state
    x, u = np.split(gates, cell.gates), np.split(h @ w["state"]["kernel"], cell.gates)
    if isinstance(cell, LSTMConfig):
        i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
        c = sigmoid(f + cell.forget_bias) * rest[0] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    r, z = (sigmoid(a + b) for a, b in zip(x[:2], u[:2], strict=True))
    return ((1 - z) * np.tanh(x[2] + r * (u[2] + w["state"]["bias"])) + z * h,)


def scan(cell, w, x, state):
    outputs = []
    for token in x:
        state = advance(cell, w, token @ w["input"]["kernel"] + w["input"]["bias"], state)
        outputs.append(state[0])
    return np.array(outputs), state


def encoded(config, layers, x):
    """Return the encoder outputs of a source (S, E), and the last state of each layer."""
    states, sizes = [], {"forward": config.width, "backward": 0}
    if config.bidirectional:
        sizes = dict.fromkeys(sizes, config.width // 2)
    for i in range(config.depth):
        outputs, last = [], []
        for name, size in sizes.items():
            if size:
                w = jax.tree.map(lambda p, i=i: p[i], layers[name])
                direction = slice(None, None, -1 if name == "backward" else 1)
                out, state = scan(config.cell, w, x[direction], (np.zeros(size),) * config.cell.arrays)
                outputs.append(out[direction])
                last.append(state)
        x = np.concatenate(outputs, axis=-1)
        states.append(tuple(np.concatenate(parts) for parts in zip(*last, strict=True)))
    return x, states


def reference_logits(config, params, source, tokens):
    """Return logits (T, V) and attention weights (T, S), computed token by token in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    table, decoder, attention = params["embedding"]["table"], params["decoder"], config.attention
    memory, states = encoded(config, params["encoder"]["periods"], table[source])
    x, weights_of_tokens = table[tokens], []
    for i in range(config.depth - isinstance(attention, AdditiveConfig)):
        w = jax.tree.map(lambda p, i=i: p[i], decoder["layers"]["periods"]["forward"])
        x, _ = scan(config.cell, w, x, states[i])
    outputs, state = [], states[-1]
    for token in x:
        w = decoder.get("attention", {})
        if isinstance(attention, AdditiveConfig):
            keys = memory @ w["key"]["kernel"]
            scores = np.tanh(state[0] @ w["query_kernel"] + keys) @ w["score"]
        elif isinstance(attention, NoAttention):
            outputs.append(token)
            continue
        else:
            query = token @ w["query"]["kernel"] if isinstance(attention, GeneralConfig) else token
            scores = memory @ query
        weights = np.exp(scores - scores.max())
        weights_of_tokens.append(weights / weights.sum())
        context = weights_of_tokens[-1] @ memory
        if isinstance(attention, AdditiveConfig):
            gates = token @ w["input"]["kernel"] + w["input"]["bias"] + context @ w["context_kernel"]
            state = advance(config.cell, w, gates, state)
            token = state[0]
        outputs.append(np.tanh(np.concatenate([token, context]) @ decoder["out"]["kernel"]))
    readout = params["embedding" if config.tied else "readout"]["table"]
    return np.array(outputs) @ readout.T, weights_of_tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_attention_maps_match_equations(name):
    config = CONFIGS[name]
    model, params = start(config)
    inputs = {"tokens": TOKENS, "source": SOURCE, "source_segments": SOURCE_SEGMENTS}
    got = forward(model, params, **inputs)
    maps = None
    if not isinstance(config.attention, NoAttention):
        maps = attention_maps(model, params, stack="decoder", **inputs)
        assert maps.shape == (1, 2, 1, 5, 6)
    for row, length in enumerate((6, 4)):
        logits, weights_of_tokens = reference_logits(config, params, SOURCE[row, :length], TOKENS[row])
        np.testing.assert_allclose(got[row], logits, rtol=1e-4, atol=1e-4)
        if maps is not None:
            np.testing.assert_allclose(maps[0, row, 0, :, :length], weights_of_tokens, atol=1e-5)
            assert (maps[0, row, 0, :, length:] == 0).all()


@pytest.mark.parametrize("name", ["none", "additive"])
def test_cached_chunks_repeat_full_forward(name):
    """Also for a row with padding on the left; an empty source does not affect the other rows."""
    model, params = start(CONFIGS[name])
    whole = forward(model, params, TOKENS, source=SOURCE, source_segments=SOURCE_SEGMENTS)
    padded = jnp.stack([TOKENS[0], jnp.roll(TOKENS[1], 2)])
    segments = jnp.array([[1] * 5, [0, 0, 1, 1, 1]])
    cache, parts = model.init_cache(2, 0), []
    given = {"source": SOURCE, "source_segments": SOURCE_SEGMENTS}
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        out, cache = forward(model, params, padded[:, part], segments[:, part], cache=cache, **given)
        parts.append(out)
        given = {}
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1, 2:], whole[1, :3], rtol=1e-4, atol=1e-5)
    empty = forward(model, params, TOKENS, source=SOURCE, source_segments=SOURCE_SEGMENTS.at[1].set(0))
    np.testing.assert_array_equal(empty[0], whole[0])
    assert jnp.isfinite(empty).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_recurrent_seq2seq_flops_match_jaxpr(name):
    config = CONFIGS[name]
    model, params = start(config)
    program = jax.make_jaxpr(partial(model.apply, {"params": params}))(TOKENS, source=tokens_of(2, 5))
    counted = config.token_flops(VOCAB, 5)
    # The program of `attend` contains each product twice: for partial and for full mask blocks.
    times = 2 if isinstance(config.attention, GeneralConfig | DotConfig) else 1
    assert (counted.weights + times * counted.attention) * TOKENS.size == matmul_flops(program.jaxpr)


def run(config, inputs):
    model = config.build(16)
    params = model.init(jax.random.key(0), **inputs)["params"]

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        options = {"deterministic": False, "method": "loss_terms", "rngs": rngs}
        stats = model.apply({"params": params}, targets=inputs["tokens"], **inputs, **options)
        return jnp.mean(stats.lse - stats.target_logit)

    return model.apply({"params": params}, **inputs), jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("name", ["one additive layer", long("general")])
def test_mesh_scan_and_remat_do_not_change_gradients(mesh_of, name):
    config = replace(CONFIGS[name], dropout=0.2)
    inputs = {
        "tokens": tokens_of(8, 3),
        "source": tokens_of(8, 4),
        "source_segments": jnp.ones((8, 4), jnp.int32),
    }
    expected = jax.jit(partial(run, config))(inputs)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        sharded_inputs = jax.device_put(inputs, jax.P(BATCH_AXES, None))
        other = replace(config, scan=False, remat="full")
        jax.tree.map(close, jax.jit(partial(run, other))(sharded_inputs), expected)


@pytest.mark.parity
def test_bidirectional_encoder_matches_torch():
    torch = pytest.importorskip("torch")
    config = replace(CONFIGS["additive"], cell=LSTMConfig(0.0))
    model, params = start(config)
    torch_module = torch.nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for ending, name in (("", "forward"), ("_reverse", "backward")):
            layers = params["encoder"]["periods"][name]
            for i in range(2):
                w = jax.tree.map(lambda p, i=i: torch.tensor(np.array(p[i])), layers)
                getattr(torch_module, f"weight_ih_l{i}{ending}").copy_(w["input"]["kernel"].T)
                getattr(torch_module, f"weight_hh_l{i}{ending}").copy_(w["state"]["kernel"].T)
                getattr(torch_module, f"bias_ih_l{i}{ending}").copy_(w["input"]["bias"])
                getattr(torch_module, f"bias_hh_l{i}{ending}").zero_()
    x = torch.tensor(np.array(params["embedding"]["table"][SOURCE]))
    rows = torch.nn.utils.rnn.pack_padded_sequence(x, [6, 4], batch_first=True)
    outputs, last = torch_module(rows)
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    got = forward_encode(model, params)
    valid = np.asarray(SOURCE_SEGMENTS, bool)
    np.testing.assert_allclose(got.memory.hidden[valid], outputs.detach().numpy()[valid], atol=1e-5)
    for state, expected in zip(got.layers, last, strict=True):
        expected = expected.detach().numpy().reshape(2, 2, 2, 4).transpose(2, 0, 1, 3).reshape(2, 2, 8)
        np.testing.assert_allclose(state, expected, atol=1e-5)


def forward_encode(model, params):
    return jax.jit(partial(model.apply, method="encode"))({"params": params}, SOURCE, SOURCE_SEGMENTS)


def test_recurrent_seq2seq_rejects_invalid_configs_and_inputs(refuses):
    with pytest.raises(ValueError, match="an even width, not 9"):
        replace(SMALL, width=9)
    with pytest.raises(ValueError, match="at least 1"):
        AdditiveConfig(0)
    model, params = start(SMALL)
    with refuses("needs a source"):
        model.apply({"params": params}, TOKENS)
