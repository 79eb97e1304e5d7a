"""Captioning models: cached decoding, meshes, recomputation and FLOPs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import AttentionConfig, Causal, MLPConfig
from attnlab.layers.blocks import GatedCrossAttentionConfig
from attnlab.models import CaptionerConfig, DecoderConfig, ViTConfig
from attnlab.models.resampler import ResamplerConfig
from attnlab.sharding import BATCH_AXES

VOCAB = 29
ENCODER = ViTConfig(depth=2, width=12, attention=AttentionConfig(2), feed_forward=MLPConfig(20), image=(8, 12, 1), patch=(4, 4))  # fmt: skip
DECODER = DecoderConfig(
    depth=2, width=16, attention=AttentionConfig(4, kv_heads=2), feed_forward=MLPConfig(24)
)
FLAMINGO = CaptionerConfig(
    ENCODER,
    replace(DECODER, pattern=(Causal(cross_attends=False), Causal())),
    resampler=ResamplerConfig(latents=4, depth=2),
    projection=True,
    cross=GatedCrossAttentionConfig(),
)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(1, VOCAB, (4, 7)), jnp.int32)
IMAGES = jnp.asarray(RNG.normal(size=(4, 8, 12, 1)), jnp.float32)


def draw(path, x):
    mean = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(mean + 0.3 * RNG.normal(size=x.shape), x.dtype)


def start(config):
    """Return the model, parameter shapes, and random parameters with open gates."""
    model = config.build(VOCAB)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, source=IMAGES))["params"]
    return model, shapes, jax.tree_util.tree_map_with_path(draw, shapes)


def check_cache(config):
    """Check that decoding with a cache repeats the full forward pass."""
    model, _, params = start(config)
    run = jax.jit(partial(model.apply, {"params": params}))
    whole = run(TOKENS, source=IMAGES)
    cache, parts = model.init_cache(4, 9), []
    for chunk, source in ((slice(0, 6), {"source": IMAGES}), (slice(6, 7), {})):
        out, cache = run(TOKENS[:, chunk], cache=cache, **source)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)


def check_mesh(config, mesh):
    """Check that loss and gradients on a mesh, with remat, equal those on one device."""
    model, _, params = start(config)

    def run(model):
        def loss(params, tokens, images):
            s = model.apply({"params": params}, tokens, tokens, source=images, method="loss_terms")
            return (s.lse - s.target_logit).mean()

        return jax.jit(jax.value_and_grad(loss))

    expected = run(model)(params, TOKENS, IMAGES)
    halves = {half: replace(getattr(config, half), remat="full") for half in ("encoder", "decoder")}
    other = replace(config, **halves).build(VOCAB)
    with jax.set_mesh(mesh):
        rows = jax.device_put((TOKENS, IMAGES), jax.NamedSharding(mesh, jax.P(BATCH_AXES)))
        shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), rows[0], source=rows[1]))["params"]
        sharded = jax.tree.map(
            lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s.sharding.spec)), params, shapes
        )
        got = run(other)(sharded, *rows)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_captioner_cached_decoding_repeats_full_forward():
    check_cache(FLAMINGO)


@pytest.mark.slow
def test_captioner_on_mesh_repeats_gradients(mesh_of):
    check_mesh(FLAMINGO, mesh_of("data:2,fsdp:2,tensor:2"))


def test_captioner_text_depends_on_own_image():
    model, shapes, params = start(FLAMINGO)
    assert shapes["resampler"]["Embedding_0"]["table"].shape == (4, 12)
    kernel = shapes["decoder"]["layers"]["periods"]["block1"]["cross_attention"]["key"]["kernel"]
    assert kernel.shape == (1, 16, 2, 4)  # the projection has the decoder's width
    assert "cross_attention" not in shapes["decoder"]["layers"]["periods"]["block0"]
    run = jax.jit(lambda images: model.apply({"params": params}, TOKENS, source=images))
    changed = np.abs(run(IMAGES) - run(IMAGES.at[:2].add(1.0))).max((1, 2)) > 1e-4
    assert changed.tolist() == [True, True, False, False]


def test_captioner_flops_match_hand_count():
    """Count per token of a row of 8: 6 patches and the class token, resampled to 4 latents."""
    flops = FLAMINGO.token_flops(VOCAB, 8)
    encoder = 7 * 2 * (4 * 12 * 12 + 2 * 12 * 20) + 6 * 16 * 12
    resampler = 2 * (4 * (2 * 12 * 12 + 2 * 12 * 20) + (7 + 4) * 2 * 12 * 12)
    projection = 4 * 12 * 16
    decoder = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 24) + VOCAB * 16
    gated = 2 * 16 * 16 + 2 * 16 * 24 + 4 * 2 * 16 * 8 / 8
    assert flops.weights == pytest.approx(2 * ((encoder + resampler + projection) / 8 + decoder + gated))
    pairs = 12 * (2 * 7 * 7 + 2 * 4 * (7 + 4)) / 8 + 16 * (2 * (8 + 1) / 2 + 4)
    assert flops.attention == pytest.approx(4 * pairs)


def test_gated_cross_attention_rejects_post_norm():
    with pytest.raises(ValueError, match="cross=GatedCrossAttention needs"):
        replace(FLAMINGO, decoder=replace(DECODER, placement="post"))
