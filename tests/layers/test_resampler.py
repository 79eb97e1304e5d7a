"""Flamingo's ways of looking at images: a resampler before the text, gated layers within it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.attention import media
from attnlab.layers import AttentionConfig, Causal, Dtypes, LayerNormConfig, MLPConfig, NoPositions, Normal
from attnlab.layers.attention import EncoderOutput
from attnlab.layers.blocks import BlockConfig, CrossAttentionConfig, GatedCrossAttentionConfig
from attnlab.layers.resampler import Resampler, ResamplerConfig
from attnlab.models import DecoderConfig

RNG = np.random.default_rng(0)
BLOCK = BlockConfig(
    width=8,
    depth=1,
    attention=AttentionConfig(heads=2, bias=True),
    feed_forward=MLPConfig(12, "relu"),
    norm=LayerNormConfig(),
    placement="pre",
    layer_scale=None,
    positions=NoPositions(),
    cross=None,
    dropout=0.0,
    init=Normal(0.3),
    dtypes=Dtypes(),
)
MEMORY = EncoderOutput(
    jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32), jnp.array([[1] * 5, [1, 1, 1, 0, 0]])
)
TEXT = DecoderConfig(
    depth=2,
    width=8,
    attention=AttentionConfig(heads=2),
    pattern=(Causal(cross_attends=False), Causal()),
    init=Normal(0.3),
)
TOKENS = jnp.asarray(RNG.integers(1, 30, (2, 7)), jnp.int32)


def drawn(module, *args, **options):
    """Parameters with noise on what starts from zeros and ones."""
    params = jax.jit(module.init)(jax.random.key(0), *args, **options)["params"]
    return jax.tree.map(lambda x: x + RNG.normal(size=x.shape).astype(np.float32) * 0.2, params)


def test_resampler_by_hand():
    module = Resampler(ResamplerConfig(latents=3, depth=2), BLOCK, scan=True, remat="none")
    params = drawn(module, MEMORY)
    got = jax.jit(module.apply)({"params": params}, MEMORY)
    assert got.hidden.shape == (2, 3, 8) and (got.segments == 1).all()

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attended(x, both, p):
        q, k, v = (
            np.einsum("te,ehd->htd", y, p[name]["kernel"]) + p[name]["bias"][:, None]
            for name, y in (("query", x), ("key", both), ("value", both))
        )
        scores = np.exp(np.einsum("htd,hsd->hts", q, k) / 2)
        weights = scores / scores.sum(-1, keepdims=True)
        return np.einsum("hts,hsd,hde->te", weights, v, p["out"]["kernel"]) + p["out"]["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, length in enumerate((5, 3)):
        x, seen = p64["Embedding_0"]["table"], np.asarray(MEMORY.hidden[row, :length], np.float64)
        for layer in range(2):
            p = jax.tree.map(lambda x, layer=layer: x[layer], p64["layers"]["periods"]["block0"])
            own = norm(x, p["attention_norm"])
            both = np.concatenate([norm(seen, p["attention"]["memory_norm"]), own])
            x = x + attended(own, both, p["attention"])
            hidden = dense(norm(x, p["feed_forward_norm"]), p["feed_forward"]["up"])
            x = x + dense(np.maximum(hidden, 0), p["feed_forward"]["down"])
        np.testing.assert_allclose(got.hidden[row], norm(x, p64["norm"]), rtol=1e-4, atol=1e-4)


def test_gates_start_shut_and_learn():
    plain = TEXT.build(30)
    gated = TEXT.build(30, cross=GatedCrossAttentionConfig())
    params = jax.jit(gated.init)(jax.random.key(0), TOKENS, memory=MEMORY)["params"]
    without = jax.eval_shape(plain.init, jax.random.key(0), TOKENS)["params"]

    def common(ours, theirs):
        return {k: common(ours[k], v) if isinstance(v, dict) else ours[k] for k, v in theirs.items()}

    @jax.jit
    def run(params):
        def loss(params):
            return jnp.sum(jnp.sin(gated.apply({"params": params}, TOKENS, memory=MEMORY)))

        opened = jax.tree_util.tree_map_with_path(
            lambda path, x: x + 1.0 if path[-1].key.endswith("gate") else x, params
        )
        out = gated.apply({"params": params}, TOKENS, memory=MEMORY)
        return out, jax.grad(loss)(params), jax.grad(loss)(opened)

    out, grads, opened = run(params)
    expected = jax.jit(plain.apply)({"params": common(params, without)}, TOKENS)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(grads)}
    gates = {name: x for name, x in named.items() if "gate" in name}
    assert len(gates) == 2 and all("block1" in name for name in gates)  # of the kind that looks
    assert all((np.abs(x) > 1e-6).all() for x in gates.values())
    # Behind shut gates nothing learns, behind open ones all does.
    for tree, moves in ((grads, False), (opened, True)):
        found = tree["layers"]["periods"]["block1"]
        assert all((np.abs(x) > 0).any() == moves for x in jax.tree.leaves(found["cross_attention"]))
        assert (np.abs(found["cross_feed_forward"]["up"]["kernel"]) > 0).any() == moves


def test_text_looks_at_the_last_image_before_it():
    model = TEXT.build(30, cross=CrossAttentionConfig())
    images = EncoderOutput(MEMORY.hidden[:, :4], jnp.ones((2, 4), jnp.int32))
    markers = jnp.array([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]], bool)

    @jax.jit
    def run(values):
        params = model.init(jax.random.key(0), TOKENS, memory=images)["params"]

        def at(values):
            memory = EncoderOutput(values, images.segments, media(markers, tokens=2))
            return jnp.sin(model.apply({"params": params}, TOKENS, memory=memory)).sum((0, 2))

        return jax.jacrev(at)(values)[jnp.array([0, 3, 6])]

    # What is read by the last layer, the only one that looks.
    seen = np.abs(run(images.hidden)).max(-1) > 0
    first, second, none = [True, True, False, False], [False, False, True, True], [False] * 4
    assert seen.tolist() == [[none, first], [first, first], [second, second]]


def test_a_mesh_changes_no_number(mesh_of):
    resampler = Resampler(ResamplerConfig(latents=4, depth=2), BLOCK, scan=True, remat="full")
    text = TEXT.build(30, cross=GatedCrossAttentionConfig())
    params = drawn(resampler, MEMORY), drawn(text, TOKENS, memory=MEMORY)

    def run(params, memory, tokens):
        def loss(params):
            seen = resampler.apply({"params": params[0]}, memory)
            return jnp.mean(jnp.sin(text.apply({"params": params[1]}, tokens, memory=seen)))

        return jax.value_and_grad(loss)(params)

    expected = jax.jit(run)(params, MEMORY, TOKENS)
    with jax.set_mesh(mesh_of("fsdp:2,tensor:2")):
        place = lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1))  # noqa: E731
        tokens, memory = place(TOKENS), jax.tree.map(place, MEMORY)
        specs = jax.eval_shape(
            lambda: (
                resampler.init(jax.random.key(0), memory)["params"],
                text.init(jax.random.key(0), tokens, memory=memory)["params"],
            )
        )
        laid = jax.tree.map(lambda x, s: jax.reshard(x, s.sharding.spec), params, specs)
        got = jax.jit(run)(laid, memory, tokens)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="at least 1"):
        ResamplerConfig(latents=0)
    assert dataclasses.replace(TEXT, pattern=(Causal(),)).layer_specs[0].cross_attends
