"""Every score, normalizer and mixer of a layer spec trains on a mesh and decodes from a cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from attnlab import sharding
from attnlab.config.text import parse, render
from attnlab.errors import InputError
from attnlab.layers import (
    AttentionConfig,
    Bidirectional,
    Causal,
    LayerSpec,
    MLPConfig,
    mixers,
    normalizers,
    scores,
)
from attnlab.models import (
    CaptionerConfig,
    DecoderConfig,
    EncoderConfig,
    Seq2SeqConfig,
    SpeechEncoderConfig,
    ViTConfig,
)
from experiments.zoo import VARIANTS
from tests.selection import long, sample

SMALL = DecoderConfig(depth=2, width=16, attention=AttentionConfig(heads=4), feed_forward=MLPConfig(width=32))
VOCAB, LENGTH, CHUNK, STEPS = 13, 9, 3, 12
EXTRA = {
    "several": Causal(score=(scores.FoX(), scores.Selective(), scores.Softcap(2.0), scores.Softcap(1.0))),
    "gate_of_each_head": Causal(mixer=mixers.GatedOutput("head")),
    "latent_and_score": Causal(
        score=scores.CoPE(4), mixer=mixers.LatentAttention(8, 4, query_rank=8), normalizer=normalizers.TopK(3)
    ),
}


def initial(model, tokens, mesh):
    """Return random parameters, large enough for non-uniform attention, sharded over the mesh."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def draw(path, x):
        mean = 1.0 if "scale" in path[-1].key else 0.0
        value = (mean + 0.3 * rng.normal(size=x.shape)).astype(x.dtype)
        return jax.device_put(value, jax.NamedSharding(mesh, x.sharding.spec))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def train_and_decode(model, params, tokens, segments, positions):
    """Return losses and gradients of a few steps; then all logits, and those from a cache."""
    optimizer = optax.adam(1e-2)

    def loss(params):
        targets = jnp.roll(tokens, -1, axis=1)
        terms = model.apply({"params": params}, tokens, targets, segments, positions, method="loss_terms")
        return jnp.mean((terms.lse - terms.target_logit) * (segments > 0))

    def step(carry, _):
        value, grads = jax.value_and_grad(loss)(carry[0])
        updates, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), (value, grads)

    (params, _), (losses, grads) = jax.lax.scan(step, (params, optimizer.init(params)), None, STEPS)

    def decode(cache, inputs):
        logits, cache = model.apply({"params": params}, *inputs, cache=cache)
        return cache, logits

    inputs = tokens, segments, positions
    chunks = [jnp.moveaxis(x.reshape(len(x), -1, CHUNK), 1, 0) for x in inputs]
    _, cached = jax.lax.scan(decode, model.init_cache(len(tokens), LENGTH + 2), chunks)
    cached = jnp.moveaxis(cached, 0, 1).reshape(len(tokens), LENGTH, -1)
    return losses, grads, model.apply({"params": params}, *inputs), cached


def batch():
    """Return four rows; the last three tokens of row 1 and the first two of row 3 are padding.

    Row 3 has the tokens of row 2, shifted.
    """
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH), np.int32)
    tokens[3, 2:] = tokens[2, :-2]
    segments = np.ones_like(tokens)
    segments[1, -3:] = segments[3, :2] = 0
    positions = np.maximum(np.cumsum(segments > 0, axis=1, dtype=np.int32) - 1, 0)
    return tokens, segments, positions


@pytest.mark.slow
@pytest.mark.parametrize("name", sample([*VARIANTS, *EXTRA], every=2))
def test_trains_on_eight_devices_and_decodes_as_its_full_forward(name):
    spec = VARIANTS.get(name) or EXTRA[name]
    mesh = sharding.make_mesh(sharding.parse_mesh("data:2,fsdp:2,tensor:2", 8))
    with jax.set_mesh(mesh):
        inputs = [jax.device_put(x, jax.NamedSharding(mesh, sharding.spec("batch", None))) for x in batch()]
        model = replace(SMALL, pattern=(spec,)).build(VOCAB)
        result = train_and_decode(model, initial(model, inputs[0], mesh), *inputs)
        losses, grads, full, cached = jax.tree.map(np.asarray, result)
    assert losses[-1] < losses[0] - 0.1, losses
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), jax.tree_util.keystr(path)
    segments = batch()[1]
    np.testing.assert_allclose(cached[segments > 0], full[segments > 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(full[3, 2:], full[2, :-2], rtol=1e-4, atol=1e-4)


def test_every_class_is_a_variant():
    parts = {type(part) for spec in VARIANTS.values() for part in (*spec.scores, spec.normalizer, spec.mixer)}
    for base in (scores.LayerScore, normalizers.LayerNormalizer, mixers.Mixer):
        of_library = {cls for cls in base.__subclasses__() if cls.__module__.startswith("attnlab.")}
        assert of_library and of_library <= parts


@pytest.mark.parametrize("name", VARIANTS)
def test_text_of_a_flag_gives_the_spec(name):
    spec = VARIANTS[name]
    assert parse(render(spec), LayerSpec) == spec


SIZES = {"depth": 2, "width": 16, "attention": AttentionConfig(heads=4), "feed_forward": MLPConfig(width=32)}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 6), np.int32)
IMAGE, FRAMES = (
    np.random.default_rng(0).normal(size=(2, 8, *rest)).astype(np.float32) for rest in [(8, 1), (4,)]
)
SPECS = (
    Bidirectional(
        score=(scores.T5Bias(), scores.FoX(), scores.Shaw(), scores.Temperature(), scores.CoPE()),
        mixer=mixers.GatedOutput(),
    ),
    Bidirectional(score=scores.Selective(), normalizer=normalizers.Entmax(), mixer=mixers.Differential()),
    Bidirectional(normalizer=normalizers.SoftmaxOne(), mixer=mixers.LatentAttention(8, 4)),
)


def model_of(family):
    """Return a model whose encoder has all of `SPECS`, and its source."""
    encoder = SIZES | {"pattern": SPECS, "depth": 3}
    decoder, vit = DecoderConfig(**SIZES), ViTConfig(**encoder, image=(8, 8, 1), patch=(2, 2))
    speech = SpeechEncoderConfig(**encoder, mels=4, frames=8)
    return {
        "encoder": (EncoderConfig(**encoder), None),
        "vit": (vit, IMAGE),
        "seq2seq": (Seq2SeqConfig(encoder=EncoderConfig(**encoder), decoder=decoder), TOKENS),
        "captioner": (CaptionerConfig(encoder=vit, decoder=decoder), IMAGE),
        "speech": (Seq2SeqConfig(encoder=speech, decoder=decoder), FRAMES),
    }[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "seq2seq", *map(long, ("encoder", "captioner", "speech"))])
def test_every_parameter_of_bidirectional_layers_is_trained(family):
    config, source = model_of(family)
    model, inputs = config.build(VOCAB), {} if source is None else {"source": source}
    tokens = TOKENS[:, :1] if family == "vit" else TOKENS

    def grads(tokens, inputs):
        params = model.init(jax.random.key(0), tokens, **inputs)["params"]
        # A cube: the sum of a normalised vector has no gradient.
        return jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens, **inputs) ** 3))(params)

    found = {
        "/".join(path): grad
        for path, grad in flatten_dict(jax.jit(grads)(tokens, inputs)).items()
        if "attention" in path and "decoder" not in path and "pool" not in path
    }
    assert any("score_FoX" in name for name in found) and any("lambda_keys" in name for name in found)
    for name, grad in found.items():
        assert jnp.isfinite(grad).all() and jnp.any(grad), name


def test_latent_attention_refuses_options_that_it_does_not_support():
    attention = AttentionConfig(heads=4, kv_heads=2)
    config = replace(SMALL, attention=attention, pattern=(VARIANTS["latent"],))
    with pytest.raises(InputError, match="LatentAttention supports no qk_norm"):
        jax.eval_shape(config.build(VOCAB).init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Causal(score=Alibi)", "did you mean 'ALiBi'"),
        ("Causal(normalizer=TopK(0))", "k=0 must be at least 1"),
        ("Causal(mixer=Latent)", "LatentAttention"),
    ],
)
def test_a_wrong_part_is_named(text, message):
    with pytest.raises(InputError, match=message):
        parse(text, LayerSpec)
