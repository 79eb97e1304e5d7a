"""Perceiver resampler and gated cross-attention of Flamingo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.attention import media
from attnlab.layers import AttentionConfig, Causal, Dtypes, LayerNormConfig, MLPConfig, NoPositions, Normal
from attnlab.layers.attention import Documents, EncoderOutput
from attnlab.layers.blocks import BlockConfig, CrossAttentionConfig, GatedCrossAttentionConfig
from attnlab.models import DecoderConfig
from attnlab.models.resampler import Resampler, ResamplerConfig

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
    jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32), Documents(jnp.array([[1] * 5, [1, 1, 1, 0, 0]]))
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
    """Return initial parameters plus noise, so that none is exactly zero or one."""
    params = jax.jit(module.init)(jax.random.key(0), *args, **options)["params"]
    return jax.tree.map(lambda x: x + RNG.normal(size=x.shape).astype(np.float32) * 0.2, params)


def test_resampler_matches_equations():
    module = Resampler(ResamplerConfig(latents=3, depth=2), BLOCK, scan=True, remat="none")
    params = drawn(module, MEMORY)
    got = jax.jit(module.apply)({"params": params}, MEMORY)
    assert got.hidden.shape == (2, 3, 8) and (got.segments == 1).all()

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attended(x, keys, p):
        q, k, v = (
            np.einsum("te,ehd->htd", y, p[name]["kernel"]) + p[name]["bias"][:, None]
            for name, y in (("query", x), ("key", keys), ("value", keys))
        )
        scores = np.exp(np.einsum("htd,hsd->hts", q, k) / 2)
        weights = scores / scores.sum(-1, keepdims=True)
        return np.einsum("hts,hsd,hde->te", weights, v, p["out"]["kernel"]) + p["out"]["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, length in enumerate((5, 3)):
        x, memory = p64["Embedding_0"]["table"], np.asarray(MEMORY.hidden[row, :length], np.float64)
        for layer in range(2):
            p = jax.tree.map(lambda x, layer=layer: x[layer], p64["layers"]["periods"]["block0"])
            latents = norm(x, p["attention_norm"])
            keys = np.concatenate([norm(memory, p["attention"]["memory_norm"]), latents])
            x = x + attended(latents, keys, p["attention"])
            hidden = dense(norm(x, p["feed_forward_norm"]), p["feed_forward"]["up"])
            x = x + dense(np.maximum(hidden, 0), p["feed_forward"]["down"])
        np.testing.assert_allclose(got.hidden[row], norm(x, p64["norm"]), rtol=1e-4, atol=1e-4)


def test_gated_cross_attention_starts_closed_and_learns():
    plain = TEXT.build(30)
    gated = TEXT.build(30, cross=GatedCrossAttentionConfig())
    params = jax.jit(gated.init)(jax.random.key(0), TOKENS, memory=MEMORY)["params"]
    without = jax.eval_shape(plain.init, jax.random.key(0), TOKENS)["params"]

    def common(tree, shapes):
        return {k: common(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in shapes.items()}

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
    assert len(gates) == 2 and all("block1" in name for name in gates)  # the layer that cross-attends
    assert all((np.abs(x) > 1e-6).all() for x in gates.values())
    # Parameters behind closed gates have zero gradients, those behind open gates do not.
    for tree, is_open in ((grads, False), (opened, True)):
        block = tree["layers"]["periods"]["block1"]
        assert all((np.abs(x) > 0).any() == is_open for x in jax.tree.leaves(block["cross_attention"]))
        assert (np.abs(block["cross_feed_forward"]["up"]["kernel"]) > 0).any() == is_open


def test_media_mask_attends_to_last_preceding_image():
    model = TEXT.build(30, cross=CrossAttentionConfig())
    images = EncoderOutput(MEMORY.hidden[:, :4], Documents(jnp.ones((2, 4), jnp.int32)))
    markers = jnp.array([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]], bool)

    @jax.jit
    def run(values):
        params = model.init(jax.random.key(0), TOKENS, memory=images)["params"]

        def at(values):
            memory = EncoderOutput(values, images.documents, media(markers, tokens=2))
            return jnp.sin(model.apply({"params": params}, TOKENS, memory=memory)).sum((0, 2))

        return jax.jacrev(at)(values)[jnp.array([0, 3, 6])]

    # Only the last layer cross-attends, so gradients show which image tokens it attends to.
    attended = np.abs(run(images.hidden)).max(-1) > 0
    first, second, none = [True, True, False, False], [False, False, True, True], [False] * 4
    assert attended.tolist() == [[none, first], [first, first], [second, second]]


@pytest.mark.slow
def test_resampler_on_mesh_repeats_gradients(mesh_of):
    resampler = Resampler(ResamplerConfig(latents=4, depth=2), BLOCK, scan=True, remat="full")
    text = TEXT.build(30, cross=GatedCrossAttentionConfig())
    params = drawn(resampler, MEMORY), drawn(text, TOKENS, memory=MEMORY)

    def run(params, memory, tokens):
        def loss(params):
            latents = resampler.apply({"params": params[0]}, memory)
            return jnp.mean(jnp.sin(text.apply({"params": params[1]}, tokens, memory=latents)))

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
        sharded = jax.tree.map(lambda x, s: jax.reshard(x, s.sharding.spec), params, specs)
        got = jax.jit(run)(sharded, memory, tokens)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_resampler_config_rejects_zero_latents():
    with pytest.raises(ValueError, match="at least 1"):
        ResamplerConfig(latents=0)
    assert dataclasses.replace(TEXT, pattern=(Causal(),)).layer_specs[0].cross_attends
