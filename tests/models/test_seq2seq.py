"""Encoder-decoders: source padding, cached decoding, meshes, scan, remat and FLOPs."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.layers import (
    AttentionConfig,
    Bidirectional,
    Causal,
    LayerNormConfig,
    MLPConfig,
    RelativeBias,
    Sliding,
)
from attnlab.models import DecoderConfig, EncoderConfig, Learned, Seq2SeqConfig, Sinusoidal
from attnlab.sharding import BATCH_AXES
from tests.selection import long

VOCAB = 29
HALF = {"depth": 2, "width": 16, "attention": AttentionConfig(heads=4), "feed_forward": MLPConfig(24, "relu")}
POST = HALF | {
    "placement": "post",
    "norm": LayerNormConfig(),
    "positions": Sinusoidal(),
    "scale_embedding": True,
}
PAPER = Seq2SeqConfig(EncoderConfig(**POST), DecoderConfig(**POST), shared_embedding=True)
# Encoder and decoder differ in depth, width and pattern, and do not share the embedding table.
ODD = Seq2SeqConfig(
    EncoderConfig(**HALF | {"depth": 3, "width": 12, "attention": AttentionConfig(3), "pattern": (Bidirectional(1, 1), Bidirectional()), "positions": RelativeBias(8, 16)}),
    DecoderConfig(**HALF | {"depth": 3, "attention": AttentionConfig(4, kv_heads=2, qk_norm=True), "pattern": (Sliding(3), Causal()), "positions": RelativeBias(8, 16), "tied": False}),
)  # fmt: skip
CONFIGS = {"paper": PAPER, "odd": ODD}


def ids(b, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, VOCAB, (b, length)), jnp.int32)


TOKENS, SOURCE = ids(2, 7), ids(2, 5, seed=1)
SOURCE_SEGMENTS = jnp.array([[1] * 5, [1] * 3 + [0] * 2])


@cache
def start(config, scale=0.2):
    """Return the model and random parameters, large enough for non-uniform attention."""
    model, rng = config.build(VOCAB), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, source=SOURCE))["params"]

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def run(model, params, *args, **options):
    return model.apply({"params": params}, *args, **options)


close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_depend_on_source_but_not_its_padding(name):
    model, params = start(CONFIGS[name])
    padded = run(model, params, TOKENS, source=SOURCE, source_segments=SOURCE_SEGMENTS)
    alone = run(model, params, TOKENS[1:], source=SOURCE[1:, :3])
    close(padded[1:], alone)
    other = SOURCE.at[:, 3:].set(7)
    changed = run(model, params, TOKENS, source=other, source_segments=SOURCE_SEGMENTS)
    np.testing.assert_array_equal(changed[1], padded[1])
    assert (abs(changed[0] - padded[0]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_repeats_full_forward(name):
    model, params = start(CONFIGS[name])
    source = {"source": SOURCE, "source_segments": SOURCE_SEGMENTS}
    whole = run(model, params, TOKENS, **source)
    cache, parts = model.init_cache(2, 9), []
    for chunk in (slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))):
        out, cache = run(model, params, TOKENS[:, chunk], cache=cache, **source)
        parts.append(out)
        source = {}
    close(jnp.concatenate(parts, axis=1), whole)


def test_shared_embedding_is_one_parameter():
    tables = [name for name, _ in named_leaves(start(PAPER)[1]) if name.endswith("table")]
    assert tables == ["decoder/embedding/table"]
    tables = [name for name, _ in named_leaves(start(ODD)[1]) if name.endswith("table")]
    relative = ["decoder/relative/table", "encoder/relative/table"]
    assert sorted(set(tables) - set(relative)) == [
        "decoder/embedding/table",
        "decoder/readout/table",
        "encoder/embedding/table",
    ]
    with pytest.raises(ValueError, match="as wide as"):
        replace(ODD, shared_embedding=True)


def named_leaves(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def gradients(config, params, tokens, source, source_segments):
    """Return the loss and its gradients."""

    def loss(params):
        model = config.build(VOCAB)
        s = model.apply(
            {"params": params},
            tokens,
            tokens,
            source=source,
            source_segments=source_segments,
            method="loss_terms",
        )
        return (s.lse - s.target_logit).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"scan": False}, long({"remat": "full"})], ids=str)
def test_scan_and_remat_do_not_change_gradients(change):
    _, params = start(ODD)
    expected = gradients(ODD, params, TOKENS, SOURCE, SOURCE_SEGMENTS)
    halves = {half: replace(getattr(ODD, half), **change) for half in ("encoder", "decoder")}
    got = gradients(replace(ODD, **halves), params, TOKENS, SOURCE, SOURCE_SEGMENTS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.slow
def test_seq2seq_on_mesh_repeats_gradients(mesh_of):
    model, params = start(PAPER)
    arrays = [jnp.tile(x, (4, 1)) for x in (TOKENS, SOURCE, SOURCE_SEGMENTS)]
    expected = gradients(PAPER, params, *arrays)
    mesh = mesh_of("data:2,fsdp:2,tensor:2")
    rows = jax.NamedSharding(mesh, P(BATCH_AXES))
    with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, rows)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), arrays[0], source=arrays[1]))["params"]
        sharded = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        got = gradients(PAPER, sharded, *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_seq2seq_flops_match_hand_count(mesh_of):
    """Count one encoder and one decoder layer: width 16, 4 heads of 4, inner width 24."""
    config = replace(PAPER, encoder=replace(PAPER.encoder, depth=1), decoder=replace(PAPER.decoder, depth=1))
    flops = config.token_flops(VOCAB, 8)
    layer = 4 * 16 * 16 + 2 * 16 * 24
    assert flops.weights == 2 * (layer + layer + 4 * 16 * 16 + VOCAB * 16)
    # Encoder and cross-attention use all 8 keys, causal self-attention (8 + 1) / 2 on average.
    assert flops.attention == 4 * 16 * (8 + 8 + (8 + 1) / 2)


def test_seq2seq_checks_source_length(refuses):
    config = replace(ODD, encoder=replace(ODD.encoder, positions=Learned(16)))
    config.check_source_length(16)
    with refuses("length 17", "positions.length=16"):
        config.check_source_length(17)
