"""Rematerialisation by name: the stored activations, and equal gradients in float64."""

import dataclasses
import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import config as configs
from attnlab import sharding
from attnlab.layers import (
    AttentionConfig,
    Causal,
    Dtypes,
    ExpertsConfig,
    GatedMLPConfig,
    LatentAttention,
    MLPConfig,
    Save,
    Sliding,
)
from attnlab.models import DecoderConfig, EncoderConfig, Seq2SeqConfig, ViTConfig
from tests.train.small import make_experiment, make_session

LATENT = LatentAttention(rank=8, rotary_dim=4)
VOCAB, B, T, E, F, H, K, D = 11, 2, 6, 16, 24, 4, 2, 4
DECODER = DecoderConfig(
    depth=2, width=E, attention=AttentionConfig(H, K), feed_forward=GatedMLPConfig(width=F)
)
NAMES = tuple(f.name for f in dataclasses.fields(Save))
TOKENS = jnp.arange(B * T).reshape(B, T) % VOCAB
# The shapes that a block of DECODER stores under each name. Its feed-forward output is not needed
# in the backward pass.
STORED = {
    "query": [(B, T, H, D)],
    "key": [(B, T, K, D)],
    "value": [(B, T, K, D)],
    "attention_out": [(B, K, H // K, T, D), (B, K, H // K, T)],  # in the layout of `blockwise`
    "mlp_hidden": [(B, T, F)] * 2,
    "branch_out": [(B, T, E)],
}


def mean_loss(config):
    """Return the mean loss of a language model as a function of its parameters."""

    def loss(params):
        model = config.build(VOCAB)
        stats = model.apply({"params": params}, TOKENS, TOKENS[:, ::-1], method="loss_terms")
        return jnp.mean(stats.lse - stats.target_logit)

    return loss


@cache
def residuals(remat, **options):
    """Return the shapes of the arrays that the forward pass of DECODER stores with counts."""
    config = replace(DECODER, remat=remat, **options)
    params = jax.eval_shape(config.build(VOCAB).init, jax.random.key(0), TOKENS)["params"]
    stored = jax.eval_shape(lambda p: jax.vjp(mean_loss(config), p)[1], params)
    return Counter(x.shape for x in jax.tree.leaves(stored))


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_named_activations_are_stored(name):
    more = residuals(Save(**{name: "device"}))
    more.subtract(residuals("full"))
    stacked = Counter((DECODER.depth, *shape) for shape in STORED[name])
    assert {shape: count for shape, count in more.items() if count} == stacked


def test_each_unrolled_block_stores_its_own():
    more = residuals(Save(**dict.fromkeys(NAMES, "device")), unrolled=True)
    more.subtract(residuals("full", unrolled=True))
    shapes = [shape for name in NAMES for shape in STORED[name]]
    assert more == Counter(shapes * DECODER.depth)


def test_stored_bytes_increase_from_full_over_save_to_none():
    some = Save(query="device", attention_out="device")
    every = Save(**dict.fromkeys(NAMES, "device"))
    sizes = [
        sum(count * math.prod(shape) for shape, count in residuals(remat).items())
        for remat in ("full", some, every, "none")
    ]
    assert sizes == sorted(set(sizes))


DOUBLE = Dtypes("float64", "float64", "float64")
SMALL = {"depth": 3, "width": E, "feed_forward": MLPConfig(F), "dtypes": DOUBLE}
SMALL |= {"attention": AttentionConfig(H, K, qk_norm=True), "placement": "both"}
FAMILIES = {
    "decoder": DecoderConfig(**SMALL | {"feed_forward": GatedMLPConfig(F)}, pattern=(Sliding(3), Causal())),
    "experts": DecoderConfig(**SMALL | {"feed_forward": ExpertsConfig(4, 2, F)}),
    "latent": DecoderConfig(**SMALL | {"attention": AttentionConfig(H)}, pattern=(Causal(mixer=LATENT),)),
    "encoder": EncoderConfig(**SMALL),
    "seq2seq": Seq2SeqConfig(EncoderConfig(**SMALL), DecoderConfig(**SMALL)),
    "vit": ViTConfig(**SMALL, image=(8, 8, 3), patch=(4, 4)),
}
SETTINGS = {
    "full": "full",
    "dots": "dots",
    "save": Save(query="device", attention_out="device", branch_out="device"),
    "host": Save(key="device", value="device", attention_out="host", mlp_hidden="host"),
}


def with_options(config, **options):
    """Return the config with these options in every stack of layers."""
    if isinstance(config, Seq2SeqConfig):
        halves = {half: replace(getattr(config, half), **options) for half in ("encoder", "decoder")}
        return replace(config, **halves)
    return replace(config, **options)


def gradients(config):
    """Return the gradients of a smooth function of the model's outputs in float64."""
    rng = np.random.default_rng(0)
    inputs = {}
    if isinstance(config, Seq2SeqConfig):
        inputs = {"source": TOKENS[:, ::-1]}
    if isinstance(config, ViTConfig):
        inputs = {"source": jnp.asarray(rng.normal(size=(B, *config.image)))}
    model = config.build(VOCAB)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, **inputs))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), shapes)
    run = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, TOKENS, **inputs)))))
    return run(params)


def check_gradients(config, *changes):
    """Check the gradients with these changes of remat and scan against those without remat."""
    with jax.enable_x64(True):
        expected = gradients(config)
        size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        for change in changes:
            for a, b in zip(
                jax.tree.leaves(gradients(with_options(config, **change))),
                jax.tree.leaves(expected),
                strict=True,
            ):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13 * size)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_stored_activations():
    check_gradients(FAMILIES["decoder"], {"remat": SETTINGS["host"]})


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [True, False])
def test_gradients_of_every_family(family, scan):
    changes = [{"remat": remat, "scan": scan} for remat in SETTINGS.values()]
    check_gradients(with_options(FAMILIES[family], scan=scan), *changes)


def test_names_are_fields_of_the_command_line(refuses):
    parse = partial(configs.override, make_experiment())
    e = parse("model.remat", "Save(attention_out=host,mlp_hidden=device)")
    assert e.model.remat == Save(attention_out="host", mlp_hidden="device")
    assert configs.override(e, "model.remat.attention_out", "device").model.remat.names("host") == []
    with refuses("no field 'mlp'", "mlp_hidden", *NAMES):
        parse("model.remat", "Save(mlp=device)")
    with refuses("'recompute', 'device', 'host'"):
        parse("model.remat", "Save(query=disk)")
    with refuses("'none', 'full', 'dots' or Save"):
        parse("model.remat", "half")
    with refuses("'none', 'full', 'dots'"):  # its blocks have none of these activations
        configs.override(parse("model", "RecurrentConfig"), "model.remat", "Save(query=device)")


def test_a_platform_without_host_memory_is_refused_by_name(refuses, monkeypatch):
    memories = [SimpleNamespace(kind="device")]
    device = SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: memories)
    e = configs.override(make_experiment(), "model.remat", "Save(mlp_hidden=host)")
    monkeypatch.setattr(sharding, "mesh_device", lambda mesh: device)
    with refuses("model.remat.mlp_hidden=host", "pinned_host", "Abacus"):
        make_session(e)
    make_session(configs.override(e, "model.remat.mlp_hidden", "device"))
