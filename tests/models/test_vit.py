"""Vision Transformers: token order, image sizes, padding, pooling and meshes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import attention_maps
from attnlab.layers import AttentionConfig, GatedMLPConfig, MLPConfig
from attnlab.layers.pooling import ClassAndMean, Distilled, Probe
from attnlab.models import ViTConfig
from attnlab.sharding import BATCH_AXES

SMALL = ViTConfig(depth=2, width=16, attention=AttentionConfig(4), feed_forward=MLPConfig(24), image=(8, 12, 3), patch=(4, 2), classes=5)  # fmt: skip
ODD = replace(
    SMALL,
    class_tokens=2,
    registers=3,
    mask_token=True,
    embedding_norm=True,
    layer_scale=0.5,
    feed_forward=GatedMLPConfig(24, bias=True),
    attention=AttentionConfig(4, kv_heads=2, bias=True),
    patch_bias=False,
)
KINDS = {
    "distilled": replace(ODD, pooling=Distilled()),
    "probe": replace(SMALL, pooling=Probe(), class_tokens=0, placement="post"),
}
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(8, 8, 12, 3)), jnp.float32)
TOKENS = jnp.zeros((8, 1), jnp.int32)
TARGETS = jnp.asarray(RNG.integers(0, 5, (8, 1)), jnp.int32)


def start(config):
    """Return the model and random parameters."""
    model = config.build(5)
    params = model.init(jax.random.key(0), TOKENS, source=IMAGES)["params"]
    return model, jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype) * 0.3, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loss_terms_match_logits_also_on_mesh(mesh_of, kind):
    model, params = start(KINDS[kind])

    def loss(params, images):
        s = model.apply({"params": params}, TOKENS, TARGETS, source=images, method="loss_terms")
        return jnp.mean(s.lse - s.target_logit), model.apply({"params": params}, TOKENS, source=images)

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, IMAGES)
    assert logits.shape == (8, 1, 5)
    expected = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    assert all(
        jnp.any(g != 0) for name, g in gradients.items() if name != "mask_token" for g in jax.tree.leaves(g)
    )

    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        images = jax.device_put(IMAGES, jax.P(BATCH_AXES))
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, source=images))["params"]
        sharded = jax.tree.map(lambda p, x: jax.device_put(p, x.sharding.spec), params, like)
        (_, got), got_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(sharded, images)
        assert jax.typeof(got).sharding.spec[0] == BATCH_AXES
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got_gradients, gradients
    )


def test_embed_orders_prefix_tokens_before_patches():
    """Class and distillation token, registers, then patches; only patches depend on the image."""
    model, params = start(ODD)
    embed = jax.jit(lambda p, images: model.apply({"params": p}, images, None, None, True, method="embed"))
    a, b = embed(params, IMAGES), embed(params, IMAGES.at[:, :4, 2:4].add(1.0))
    assert a.hidden.shape == (8, 5 + 2 * 6, 16)
    assert np.array_equal(np.nonzero(np.any(a.hidden != b.hidden, axis=(0, 2)))[0], [5 + 1])
    # Registers have no position, so they alone do not depend on the position table.
    other_positions = jax.tree.map(lambda p: p + 1 + jnp.arange(16.0)[None], params["position_embedding"])
    c = embed(params | {"position_embedding": other_positions}, IMAGES)
    unchanged = np.all(a.hidden == c.hidden, axis=(0, 2))
    assert unchanged.tolist() == [False, False, True, True, True] + [False] * 12


def test_padding_rows_of_pixels_do_not_change_logits():
    config = replace(ODD, pooling=ClassAndMean(), image=(8, 12, 3))
    model, params = start(config)
    segments = jnp.asarray([[1] * 4 + [0] * 4] * 8, jnp.int32)

    @jax.jit
    def run(images, segments):
        return model.apply({"params": params}, TOKENS, source=images, source_segments=segments)

    expected = run(IMAGES, segments)
    np.testing.assert_array_equal(run(IMAGES.at[:, 4:].set(7.0), segments), expected)
    assert np.all(np.isfinite(run(IMAGES, jnp.zeros_like(segments))))
    assert not np.allclose(run(IMAGES, jnp.ones_like(segments)), expected)


def test_masked_patches_do_not_change_output():
    model, params = start(ODD)
    masked = jnp.zeros((8, 12), bool).at[:, 3].set(True)
    encode = jax.jit(
        lambda images: model.apply({"params": params}, images, masked=masked, method="encode").hidden
    )
    np.testing.assert_array_equal(encode(IMAGES), encode(IMAGES.at[:, :4, 6:8].add(1.0)))
    assert not np.array_equal(encode(IMAGES), encode(IMAGES.at[:, :4, 8:].add(1.0)))


def test_attention_maps_of_other_size_ignore_remaining_pixels():
    model, params = start(SMALL)
    bigger = jnp.asarray(RNG.normal(size=(8, 13, 7, 3)), jnp.float32)
    maps = attention_maps(model, params, tokens=TOKENS, source=bigger)
    assert maps.shape == (2, 8, 4, 1 + 3 * 3, 1 + 3 * 3)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    cropped = attention_maps(model, params, tokens=TOKENS, source=bigger[:, :12, :6])
    np.testing.assert_array_equal(maps, cropped)


def test_vit_flops_match_hand_count():
    counted = SMALL.token_flops(5, 1)
    projections, feed_forward, tokens = 4 * 16 * 16, 2 * 16 * 24, 13
    weights = 2 * (2 * tokens * (projections + feed_forward) + 12 * 24 * 16 + 5 * 16)
    assert counted.weights == weights
    assert counted.attention == 2 * 4 * 16 * tokens * tokens


def test_vit_rejects_invalid_configs_and_lengths(refuses):
    with refuses("one class", "must be 1, not 4"):
        SMALL.check_length(4)
    with refuses("model.classes=5", "9 words"):
        SMALL.build(9)
    headless = replace(SMALL, classes=0).build(9)
    with refuses("no head"):
        headless.init(jax.random.key(0), TOKENS, TARGETS, source=IMAGES, method="loss_terms")
    for images in (IMAGES[:, :3], IMAGES[..., :1]):
        with refuses("do not fit the model, whose patches are 4x2 with 3 channels"):
            SMALL.build(5).init(jax.random.key(0), TOKENS, source=images)
    for change, message in (
        ({"patch": (16, 2)}, "at least one patch"),
        ({"class_tokens": 3}, "0, 1 or 2"),
        ({"class_tokens": 0}, "needs class_tokens of at least 1"),
        ({"pooling": Distilled()}, "needs class_tokens of at least 2"),
        ({"layer_scale": 0.0}, "over 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
