import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from attnlab.layers import (
    AttentionConfig,
    Bidirectional,
    Causal,
    Dtypes,
    GatedMLPConfig,
    LayerNormConfig,
    MuP,
    NoPositions,
    Normal,
    RelativeBias,
    RMSNormConfig,
    Rotary,
    Sliding,
)
from attnlab.models import DecoderConfig, Learned
from attnlab.sharding import BATCH_AXES, out_sharding
from tests.selection import long

VOCAB = 13
SMALL = DecoderConfig(
    depth=3,
    width=16,
    attention=AttentionConfig(heads=4, kv_heads=2, qk_norm=True),
    feed_forward=GatedMLPConfig(width=24),
    pattern=(Sliding(3), Causal()),
)
GPT2 = DecoderConfig(
    depth=2,
    width=16,
    attention=AttentionConfig(heads=2, bias=True),
    norm=LayerNormConfig(),
    positions=Learned(32),
)
MQA = replace(SMALL, depth=1, attention=AttentionConfig(heads=4, kv_heads=1, softcap=5.0), logit_softcap=4.0)


def tokens_of(b=2, t=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (b, t)), jnp.int32)


@cache
def start(config, scale=0.2, vocab=VOCAB):
    """Return the model and random parameters, large enough for non-uniform attention."""
    model, rng = config.build(vocab), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_of())["params"]

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def forward(model):
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def dependence(config, t=8):
    """Return the size of the gradient of output i (rows) by the embedding of token j (columns)."""
    model, params = start(config, vocab=t)
    tokens = jnp.arange(t)[None]  # each position has its own row of the table

    def rows(table):
        x = model.apply({"params": params | {"embedding": {"table": table}}}, tokens, method="hidden")
        return x[0].sum(-1) + (x[0] ** 2).sum(-1)

    return np.asarray(jnp.abs(jax.jit(jax.jacrev(rows))(params["embedding"]["table"])).max(-1))


DISTANCE = np.arange(8)[:, None] - np.arange(8)[None]  # query position minus key position


@pytest.mark.parametrize(
    "pattern, depth, attends",
    [
        ((Causal(),), 2, DISTANCE >= 0),
        ((Sliding(2),), 1, (DISTANCE >= 0) & (DISTANCE < 2)),
        ((Sliding(2),), 3, (DISTANCE >= 0) & (DISTANCE < 4)),  # each layer reaches one token further
        ((Sliding(3), Causal(positions=NoPositions())), 3, DISTANCE >= 0),
        ((Bidirectional(),), 1, DISTANCE == DISTANCE),
        ((Bidirectional(left=2, right=2),), 1, abs(DISTANCE) <= 2),
    ],
)
def test_outputs_depend_exactly_on_attended_tokens(pattern, depth, attends):
    got = dependence(replace(SMALL, pattern=pattern, depth=depth))
    assert (got[~attends] == 0).all()
    assert (got[attends] > 1e-6).all()


@pytest.mark.parametrize("config", [SMALL, GPT2], ids=["small", "gpt2"])
def test_packing_and_padding_do_not_change_logits(config):
    model, params = start(config)
    run = forward(model)
    a, b = tokens_of(1, 4), tokens_of(1, 5, seed=1)
    row = jnp.concatenate([a, b, tokens_of(1, 2, seed=2)], axis=1)
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2])
    positions = jnp.array([[*range(4), *range(5), 0, 0]])
    packed = run(params, row, segments, positions)
    np.testing.assert_allclose(packed[:, :4], run(params, a), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 4:9], run(params, b), rtol=1e-4, atol=1e-4)
    other = run(params, row.at[:, 9:].set(0).at[:, :4].set(7), segments, positions)
    np.testing.assert_array_equal(other[:, 4:9], packed[:, 4:9])
    assert jnp.isfinite(packed).all()


def loss(config, params, dropout):
    tokens = tokens_of()
    stats = config.build(VOCAB).apply(
        {"params": params},
        tokens,
        jnp.roll(tokens, -1, axis=1),
        deterministic=dropout is None,
        method="loss_terms",
        rngs={} if dropout is None else {"dropout": dropout},
    )
    return jnp.mean(stats.lse - stats.target_logit)


@pytest.mark.slow
@pytest.mark.slow
def test_scan_and_remat_do_not_change_gradients():
    config = replace(SMALL, depth=5, dropout=0.2)  # two whole repeats of the pattern and one more layer
    _, params = start(config, scale=0.1)
    assert set(params["layers"]) == {"periods", "tail"}
    key = jax.random.key(7)

    def value_and_grad(config):
        return jax.jit(jax.value_and_grad(lambda params: loss(config, params, key)))(params)

    expected = value_and_grad(config)
    for change in ({"scan": False}, {"remat": "full"}, {"remat": "dots"}):
        other = replace(config, **change)
        tree = jax.eval_shape(other.build(VOCAB).init, jax.random.key(0), tokens_of())["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tree)
        for a, b in zip(jax.tree.leaves(value_and_grad(other)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_key():
    config = replace(SMALL, dropout=0.2, attention=AttentionConfig(heads=4, dropout=0.2))
    _, params = start(config, scale=0.1)
    run = jax.jit(lambda key: loss(config, params, key))
    first, repeated, other = (run(jax.random.key(i)) for i in (0, 0, 1))
    assert first == repeated != other
    assert first != jax.jit(lambda: loss(config, params, None))()


def test_scanned_layers_have_different_initial_values():
    model = replace(SMALL, depth=4).build(VOCAB)
    params = jax.jit(model.init)(jax.random.key(0), tokens_of())["params"]
    kernel = params["layers"]["periods"]["block0"]["attention"]["query"]["kernel"]
    assert kernel.shape == (2, 16, 4, 4)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.3


@pytest.mark.parametrize("config", [SMALL, GPT2, long(MQA)], ids=["sliding", "learned", "mqa"])
def test_cached_decoding_repeats_full_forward(config):
    model, params = start(config)
    tokens = tokens_of(2, 9)
    lengths, prompt = (9, 7), 5  # the second row has two tokens of padding on the left
    full = forward(model)(params, tokens)
    short = forward(model)(params, tokens[1:, : lengths[1]])
    padded = jnp.stack([tokens[0], jnp.concatenate([jnp.zeros(2, jnp.int32), tokens[1, :7]])])
    segments = jnp.array([[1] * 9, [0] * 2 + [1] * 7])
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    step = jax.jit(lambda params, *a, cache: model.apply({"params": params}, *a, cache=cache))
    for given in (positions, None):  # None: positions are counted from the tokens in the cache
        cache, parts = model.init_cache(2, 11), []
        for chunk in (slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, 9))):
            chunk_positions = None if given is None else given[:, chunk]
            out, cache = step(params, padded[:, chunk], segments[:, chunk], chunk_positions, cache=cache)
            parts.append(out)
        got = jnp.concatenate(parts, axis=1)
        np.testing.assert_allclose(got[0], full[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1, 2:], short[0], rtol=1e-4, atol=1e-4)
        assert int(cache.index) == 9


def test_decoder_dtypes():
    config = replace(SMALL, dtypes=Dtypes(compute="bfloat16"))
    model, params = start(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(lambda: model.apply({"params": params}, tokens_of(), method="hidden"))
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: model.apply({"params": params}, tokens_of())).dtype == jnp.float32
    assert model.init_cache(1, 4).layers[0][0].key.dtype == jnp.bfloat16


def test_bfloat16_computation_rounds_no_scale_bias_or_sink():
    """Only parameters that scale or shift are used unrounded: rounding them changes the logits."""
    config = replace(
        GPT2,
        attention=AttentionConfig(heads=2, sinks=True),
        positions=RelativeBias(),
        layer_scale=0.1,
        readout_bias=True,
        dtypes=Dtypes(compute="bfloat16"),
    )
    model, params = start(config)
    rng = np.random.default_rng(2)  # with others, the rounding of two sinks can be too small to show
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens_of()))
    expected, flat = logits(params), {"/".join(path): x for path, x in flatten_dict(params).items()}
    changing = set()
    for name, value in flat.items():
        rounded = flat | {name: value.astype(jnp.bfloat16).astype(jnp.float32)}
        got = logits(unflatten_dict({tuple(name.split("/")): x for name, x in rounded.items()}))
        changing |= {name} if np.any(got != expected) else set()
    wide = r"norm/|sinks|layer_scale|readout_bias|relative"
    assert changing == {name for name in flat if re.search(wide, name)}
    assert len(changing) == 11


def test_tied_decoder_has_one_table():
    assert "readout" not in start(SMALL)[1]
    assert start(replace(SMALL, tied=False))[1]["readout"]["table"].shape == (VOCAB, 16)


@pytest.mark.parametrize("text", ["fsdp:8", "tensor:2", "data:2,fsdp:2,tensor:2"])
@pytest.mark.parametrize("vocab", [64, 257])
def test_parameters_follow_logical_axis_rules(mesh_of, text, vocab):
    config = replace(
        SMALL, tied=False, positions=Learned(8), attention=AttentionConfig(heads=4, kv_heads=2, bias=True)
    )
    with jax.set_mesh(mesh_of(text)):
        tokens = jnp.zeros((8, 4), jnp.int32, out_sharding=out_sharding("batch", None))
        shapes = jax.eval_shape(config.build(vocab).init, jax.random.key(0), tokens)["params"]
    got = jax.tree.map(lambda x: x.sharding.spec, shapes)
    # A tensor axis of size 1 also divides a vocabulary of 257; one of size 2 does not.
    vocab_axis = None if vocab == 257 and "tensor" in text else "tensor"
    assert got["embedding"]["table"] == got["readout"]["table"] == P(vocab_axis, "fsdp")
    assert got["position_embedding"]["table"] == P(None, "fsdp")
    block = got["layers"]["periods"]["block1"]
    assert block["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert block["attention"]["key"]["bias"] == P(None, "tensor", None)
    assert block["attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert block["attention"]["out"]["bias"] == P(None, None)
    assert block["feed_forward"]["up"]["kernel"] == P(None, "fsdp", "tensor")
    assert block["feed_forward"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert block["attention_norm"]["scale"] == P(None, None)
    assert got["layers"]["tail"]["block0"]["attention"]["value"]["kernel"] == P("fsdp", "tensor", None)
    assert got["norm"]["scale"] == P(None)


@pytest.mark.long
@pytest.mark.parametrize("text", ["data:2,fsdp:2,tensor:2", "fsdp:8"])
def test_decoder_on_mesh_repeats_gradients(mesh_of, text):
    config = replace(SMALL, depth=2, dropout=0.1)
    model, tokens = config.build(257), tokens_of(8, 5)

    def run(tokens):
        params = model.init(jax.random.key(0), tokens)["params"]

        def loss(params):
            stats = model.apply(
                {"params": params},
                tokens,
                tokens,
                deterministic=False,
                method="loss_terms",
                rngs={"dropout": jax.random.key(1)},
            )
            return stats.lse.mean()

        logits = model.apply({"params": params}, tokens)
        return params, logits, jax.value_and_grad(loss)(params)

    expected = jax.jit(run)(tokens)
    mesh = mesh_of(text)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(tokens, jax.NamedSharding(mesh, P(BATCH_AXES, None))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got[0], expected[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got[1:], expected[1:])


@pytest.mark.slow
@pytest.mark.slow
def test_mup_updates_are_independent_of_width():
    """Compare updates of one Adam step by width: coordinate check of arXiv 2203.03466, app. D.1."""

    def sizes(init, width):
        config = DecoderConfig(depth=1, width=width, attention=AttentionConfig(heads=width // 16), init=init)
        model, tokens = config.build(VOCAB), tokens_of(4, 8)
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

        def sign_update(path, p, g):
            hidden = jax.tree_util.keystr(path, simple=True).endswith("kernel")
            return p - 0.02 * (init.learning_rate(width) if hidden else 1.0) * jnp.sign(g)

        @jax.jit
        def step(params):
            def loss(params):
                stats = model.apply({"params": params}, tokens, tokens, method="loss_terms")
                return jnp.mean(stats.lse - stats.target_logit)

            return jax.tree_util.tree_map_with_path(sign_update, params, jax.grad(loss)(params))

        @jax.jit
        def outputs(params):
            logits, state = model.apply({"params": params}, tokens, capture_intermediates=True)
            block = state["intermediates"]["layers"]["periods"]["block0"]
            return logits, block["feed_forward"]["__call__"][0]

        before, after = outputs(params), outputs(step(params))
        return [float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in zip(after, before, strict=True)]

    narrow, wide = (np.array(sizes(MuP(base_width=64, base_head_dim=16), w)) for w in (64, 256))
    assert ((wide / narrow > 0.5) & (wide / narrow < 2)).all()
    narrow, wide = (np.array(sizes(Normal(), w)) for w in (64, 256))
    assert (wide / narrow > 2.5).any()  # without muP, updates grow with the width


def test_decoder_config_rejects_invalid_values(refuses):
    for change, message in [
        ({"width": 18}, "not a multiple of attention.heads"),
        ({"pattern": ()}, "at least one kind"),
        ({"depth": 0}, "at least 1"),
        ({"dropout": 1.0}, "under 1"),
        ({"logit_softcap": 0.0}, "over 0"),
        ({"positions": Rotary(fraction=0.25)}, "head_dim"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
    with pytest.raises(ValueError, match="one of 1, 2, 4"):
        AttentionConfig(heads=4, kv_heads=3)
    with refuses("length 33", "positions.length=32"):
        GPT2.check_length(33)
    GPT2.check_length(32)


@pytest.mark.parity
def test_parity_with_gpt2():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    hf_model = transformers.GPT2LMHeadModel(config).eval()
    # Initial biases are 0 and norm scales are 1: random values reveal swapped parameters.
    rng = np.random.default_rng(0)
    state = hf_model.state_dict()
    for name, value in state.items():
        if value.ndim == 1:
            value.copy_(torch.tensor(rng.normal(size=value.shape) + name.count("ln") * name.count("weight")))
    w = {k: v.numpy() for k, v in state.items()}
    blocks = []
    for i in range(2):
        h = f"transformer.h.{i}."
        qkv = np.split(w[h + "attn.c_attn.weight"], 3, axis=1)
        qkv_bias = np.split(w[h + "attn.c_attn.bias"], 3)
        attention = {
            name: {"kernel": k.reshape(16, 2, 8), "bias": b.reshape(2, 8)}
            for name, k, b in zip(("query", "key", "value"), qkv, qkv_bias, strict=True)
        }
        out = {"kernel": w[h + "attn.c_proj.weight"].reshape(2, 8, 16), "bias": w[h + "attn.c_proj.bias"]}
        blocks.append(
            {
                "attention": attention | {"out": out},
                "attention_norm": {"scale": w[h + "ln_1.weight"], "bias": w[h + "ln_1.bias"]},
                "feed_forward_norm": {"scale": w[h + "ln_2.weight"], "bias": w[h + "ln_2.bias"]},
                "feed_forward": {
                    "up": {"kernel": w[h + "mlp.c_fc.weight"], "bias": w[h + "mlp.c_fc.bias"]},
                    "down": {"kernel": w[h + "mlp.c_proj.weight"], "bias": w[h + "mlp.c_proj.bias"]},
                },
            }
        )
    params = {
        "embedding": {"table": w["transformer.wte.weight"]},
        "position_embedding": {"table": w["transformer.wpe.weight"]},
        "norm": {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]},
        "layers": {"periods": {"block0": jax.tree.map(lambda *x: np.stack(x), *blocks)}},
    }
    assert_same_logits(GPT2, params, hf_model)


@pytest.mark.parity
def test_parity_with_llama():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        initializer_range=0.3,
        rms_norm_eps=1e-6,
    )
    hf_model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    state = hf_model.state_dict()
    for value in state.values():
        if value.ndim == 1:
            value.copy_(torch.tensor(rng.normal(size=value.shape)))
    w = {k: v.numpy() for k, v in state.items()}
    blocks = []
    for i in range(2):
        h = f"model.layers.{i}."

        def heads(name, n, h=h):
            return {"kernel": w[h + f"self_attn.{name}_proj.weight"].T.reshape(16, n, 4)}

        def mlp(name, h=h):
            return {"kernel": w[h + f"mlp.{name}_proj.weight"].T}

        out = {"kernel": w[h + "self_attn.o_proj.weight"].T.reshape(4, 4, 16)}
        blocks.append(
            {
                "attention": {
                    "query": heads("q", 4),
                    "key": heads("k", 2),
                    "value": heads("v", 2),
                    "out": out,
                },
                "attention_norm": {"scale": w[h + "input_layernorm.weight"]},
                "feed_forward_norm": {"scale": w[h + "post_attention_layernorm.weight"]},
                "feed_forward": {name: mlp(name) for name in ("gate", "up", "down")},
            }
        )
    params = {
        "embedding": {"table": w["model.embed_tokens.weight"]},
        "readout": {"table": w["lm_head.weight"]},
        "norm": {"scale": w["model.norm.weight"]},
        "layers": {"periods": {"block0": jax.tree.map(lambda *x: np.stack(x), *blocks)}},
    }
    decoder = replace(
        SMALL,
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2),
        norm=RMSNormConfig(),
        pattern=(Causal(),),
        tied=False,
    )
    assert_same_logits(decoder, params, hf_model)


def assert_same_logits(config, params, hf_model):
    import torch

    tokens = tokens_of(2, 11)
    with torch.no_grad():
        expected = hf_model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    model = config.build(VOCAB)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tree)
    params = jax.tree.map(jnp.asarray, params)
    assert expected.std() > 0.5
    np.testing.assert_allclose(forward(model)(params, tokens), expected, rtol=1e-4, atol=1e-4)
