"""Contrastive models: loss over all pairs, batch padding, meshes and pooling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.inspect.maps import attention_maps
from attnlab.layers import AttentionConfig, Bidirectional, Dtypes, MLPConfig, MuP
from attnlab.layers.contrastive_loss import ClipLoss, SiglipLoss
from attnlab.layers.pooling import Mean, Probe
from attnlab.models import ContrastiveConfig, ViTConfig
from attnlab.models.contrastive import EndOfText, LastToken, ProjectionConfig, TextTowerConfig
from attnlab.sharding import BATCH_AXES
from tests.selection import sample

SHARED = {"depth": 2, "width": 16, "attention": AttentionConfig(4, bias=True), "feed_forward": MLPConfig(24)}
CLIP = ContrastiveConfig(
    image=ViTConfig(**SHARED, image=(8, 8, 1), patch=(4, 4), classes=0, class_tokens=0, pooling=Mean()),
    text=TextTowerConfig(**(SHARED | {"width": 8})),
    width=12,
)
SIGLIP = replace(
    CLIP,
    image=replace(CLIP.image, pooling=Probe()),
    text=replace(CLIP.text, pattern=(Bidirectional(),)),
    width=16,
    image_projection=None,
    text_projection=ProjectionConfig(bias=True),
    objective=SiglipLoss(init_logit_bias=-1.0),
)
KINDS = {"softmax": CLIP, "sigmoid": SIGLIP}
RNG = np.random.default_rng(0)
B, T = 8, 5
IMAGES = jnp.asarray(RNG.normal(size=(B, 8, 8, 1)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(1, 11, (B, T)), jnp.int32)
SEGMENTS = jnp.asarray(np.arange(T) < RNG.integers(1, T + 1, (B, 1)), jnp.int32).at[-2:].set(0)
VALID = np.arange(B) < B - 2
IMAGE_ROWS = jnp.asarray(np.repeat(VALID[:, None], 8, axis=1), jnp.int32)


def start(config):
    """Return the model and random parameters."""
    model = config.build(11)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS, source=IMAGES)["params"]
    return model, jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape) * 0.3, p.dtype), params)


def expected_loss(config, params, images, texts):
    """Return the loss of each row, and the fraction of its two directions that are correct."""
    y = np.exp(params["logit_scale"]) * np.asarray(texts, np.float64) @ np.asarray(images, np.float64).T
    correct = ((y.argmax(0) == np.arange(len(y))) * 0.5) + ((y.argmax(1) == np.arange(len(y))) * 0.5)
    if isinstance(config.objective, ClipLoss):
        return 0.5 * (np.log(np.exp(y).sum(0)) + np.log(np.exp(y).sum(1))) - np.diag(y), correct
    signs = 2 * np.eye(len(y)) - 1
    return np.log1p(np.exp(-signs * (y + np.asarray(params["logit_bias"])))).sum(1), correct


@pytest.mark.slow
@pytest.mark.parametrize("kind", sample(KINDS, every=2))
def test_contrastive_loss_matches_definition_also_on_mesh(mesh_of, kind):
    config = KINDS[kind]
    model, params = start(config)

    def loss(params, tokens, segments, images, rows):
        inputs = {"tokens": tokens, "segment_ids": segments, "source": images, "source_segments": rows}
        s = model.apply({"params": params}, targets=tokens, **inputs, method="loss_terms")
        weights = jnp.zeros((B, T)).at[: B - 2, 0].set(1.0)
        return jnp.sum((s.lse - s.target_logit) * weights), (
            s,
            model.apply({"params": params}, **inputs, method="hidden"),
        )

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (s, vectors)), gradients = compute(params, TOKENS, SEGMENTS, IMAGES, IMAGE_ROWS)
    np.testing.assert_allclose([np.linalg.norm(x[VALID], axis=-1) for x in vectors], 1.0, rtol=1e-6)
    expected, correct = expected_loss(config, params, *(x[VALID] for x in vectors))
    np.testing.assert_allclose((s.lse - s.target_logit)[VALID], np.tile(expected[:, None], T), rtol=1e-4)
    np.testing.assert_allclose(s.correct[VALID], np.tile(correct[:, None], T))
    assert all(np.all(np.isfinite(x)) for x in s)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients))

    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        inputs = [jax.device_put(x, jax.P(BATCH_AXES)) for x in (TOKENS, SEGMENTS, IMAGES, IMAGE_ROWS)]
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs[0], source=inputs[2]))["params"]
        sharded = jax.tree.map(lambda p, x: jax.device_put(p, x.sharding.spec), params, like)
        (got, (s, _)), got_gradients = compute(sharded, *inputs)
        assert jax.typeof(s.lse).sharding.spec[0] == BATCH_AXES
    np.testing.assert_allclose(got, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got_gradients, gradients
    )


@pytest.mark.parametrize(("pooling", "expected"), [
    (LastToken(), [2, 0, 4]),
    (EndOfText(), [1, 0, 2]),
    (EndOfText(7), [0, 0, 3]),
])  # fmt: skip
def test_text_pooling_token_index(pooling, expected):
    tokens = jnp.array([[7, 9, 7, 11, 0], [3, 0, 0, 0, 0], [1, 2, 9, 7, 7]])
    segments = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert pooling.token_index(tokens, segments).tolist() == expected


def test_attention_maps_of_both_towers():
    model, params = start(CLIP)
    maps = {
        stack: attention_maps(model, params, stack, tokens=TOKENS, segment_ids=SEGMENTS, source=IMAGES)
        for stack in ("image/layers", "text/layers")
    }
    assert maps["image/layers"].shape == (2, B, 4, 4, 4) and maps["text/layers"].shape == (2, B, 4, T, T)


def test_contrastive_config_prefixes_names_with_tower():
    config = replace(CLIP, image=replace(CLIP.image, init=MuP()))
    assert config.sharded_dimensions()["model.text.width"] == ("embed", 8)
    (pattern,) = config.learning_rate_multipliers()
    assert pattern.startswith("^image/")
    assert config.token_flops(11, T).weights > CLIP.text.layer_flops(T).weights


def test_contrastive_config_rejects_invalid_values():
    for change, message in (
        ({"image": replace(CLIP.image, classes=None)}, "image.classes must be 0"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"text_projection": None}, "must be 8, that of the text tower"),
        ({"image_projection": None}, "must be 16, that of the image tower"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CLIP, **change)
    with pytest.raises(ValueError, match="a TextTower has no logits to train"):
        CLIP.text.build(11).loss_terms()


def test_logit_scale_and_bias_are_not_rounded():
    half = Dtypes(compute="bfloat16")
    config = replace(SIGLIP, image=replace(SIGLIP.image, dtypes=half), text=replace(SIGLIP.text, dtypes=half))
    params = {"logit_scale": jnp.float32(2.6592), "logit_bias": jnp.float32(-10.03)}
    x = jnp.eye(4)
    got = config.build(11).apply({"params": params}, x, x, method="pair_logits").of_text
    expected = np.exp(np.float64(2.6592)) * np.eye(4) - 10.03
    np.testing.assert_allclose(got, expected, rtol=1e-6)
