from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.layers import AttentionConfig, Bidirectional, GatedMLPConfig, LayerNormConfig, MLPConfig, Rotary
from attnlab.models import (
    ClassifierConfig,
    DenseConfig,
    EncoderConfig,
    Learned,
    MaskedLMConfig,
    MeanOfTokens,
    PooledConfig,
)
from attnlab.models.heads import pool
from attnlab.sharding import BATCH_AXES
from tests.models.test_decoder import VOCAB, forward, start, tokens_of
from tests.selection import long

BERT = EncoderConfig(
    depth=2,
    width=16,
    attention=AttentionConfig(heads=2, bias=True),
    feed_forward=MLPConfig(24),
    norm=LayerNormConfig(),
    placement="post",
    positions=Learned(16, offset=2),
    embedding_norm=True,
    token_types=2,
)
ALBERT = replace(BERT, depth=4, num_param_groups=2, embedding_width=8, head=ClassifierConfig(3))
MODERN = EncoderConfig(
    depth=4,  # the first layer, one repeat of the pattern of two, and one more layer
    width=16,
    attention=AttentionConfig(heads=2),
    feed_forward=GatedMLPConfig(24),
    norm=LayerNormConfig(bias=False),
    pattern=(Bidirectional(), Bidirectional(1, 1, positions=Rotary(50.0))),
    embedding_norm=True,
    skip_first_attention_norm=True,
    head=ClassifierConfig(3, MeanOfTokens(), DenseConfig("gelu", norm=True)),
)
CONFIGS = {"bert": BERT, "albert": ALBERT, "modernbert": MODERN}


@pytest.mark.parametrize(
    "head",
    [MaskedLMConfig(tied=False), ClassifierConfig(3), PooledConfig(MeanOfTokens(), None)],
    ids=lambda h: h.name,
)
def test_encoder_outputs_depend_on_whole_document(head):
    config = replace(BERT, head=head, depth=1)
    model, params = start(config)
    tokens = jnp.arange(6)[None]  # each position has its own row of the table

    def rows(table):
        y = model.apply({"params": params | {"embedding": {"table": table}}}, tokens)[0]
        return (y**2).sum(-1)

    got = jnp.abs(jax.jit(jax.jacrev(rows))(params["embedding"]["table"])).max(-1)
    assert (got[:, :6] > 1e-6).all() and (got[:, 6:] == 0).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packing_and_padding_do_not_change_outputs(config):
    """Documents of a packed row are independent, also for heads that pool a document."""
    model, params = start(config)
    run = forward(model)
    a, b = tokens_of(1, 4), tokens_of(1, 4, seed=1)
    row = jnp.concatenate([tokens_of(1, 2, seed=2), a, b, tokens_of(1, 1, seed=3)], axis=1)
    segments = jnp.array([[0] * 2 + [1] * 4 + [2] * 4 + [0]])
    positions = jnp.array([[0, 0, *range(4), *range(4), 0]])
    packed = run(params, row, segments, positions)
    np.testing.assert_allclose(packed[:, 2:6], run(params, a), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:10], run(params, b), rtol=1e-4, atol=1e-5)
    other = run(params, row.at[:, :2].set(0).at[:, 10:].set(0), segments, positions)
    np.testing.assert_array_equal(other[:, 2:10], packed[:, 2:10])
    assert jnp.isfinite(packed).all()


def value_and_grad(config):
    model, tokens = config.build(VOCAB), tokens_of(8, 6)

    def loss(params, tokens):
        stats = model.apply({"params": params}, tokens, tokens % 3, method="loss_terms")
        return jnp.mean(stats.lse - stats.target_logit)

    return jax.jit(jax.value_and_grad(loss)), tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", [long("albert"), "modernbert"])
def test_scan_and_remat_do_not_change_gradients(name):
    config = CONFIGS[name]
    _, params = start(config, scale=0.1)
    run, tokens = value_and_grad(config)
    expected = run(params, tokens)
    for change in ({"scan": False}, {"remat": "full"}):
        other = replace(config, **change)
        assert jax.tree.map(jnp.shape, start(other)[1]) == jax.tree.map(jnp.shape, params)
        got = value_and_grad(other)[0](params, tokens)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["albert", "modernbert"])
def test_encoder_on_mesh_repeats_gradients(mesh_of, name):
    _, params = start(CONFIGS[name], scale=0.1)
    run, tokens = value_and_grad(CONFIGS[name])
    expected = run(params, tokens)
    mesh, rows = mesh_of("data:2,fsdp:2,tensor:2"), P(BATCH_AXES, None)
    with jax.set_mesh(mesh):
        like = jnp.zeros_like(tokens, out_sharding=rows)
        shapes = jax.eval_shape(CONFIGS[name].build(VOCAB).init, jax.random.key(0), like)["params"]
        shardings = jax.tree.map(lambda x: jax.NamedSharding(mesh, x.sharding.spec), shapes)
        got = run(jax.device_put(params, shardings), jax.device_put(tokens, jax.NamedSharding(mesh, rows)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_shared_layers_match_copied_layers():
    """Two groups, each applied twice, equal a model without sharing whose parameters are copied."""
    model, params = start(ALBERT)
    shared = params["layers"]["periods"]["shared"]
    assert {x.shape[0] for x in jax.tree.leaves(shared)} == {2}
    copied = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), shared)
    unshared = replace(ALBERT, num_param_groups=None).build(VOCAB)
    got = forward(unshared)(params | {"layers": {"periods": copied}}, tokens_of())
    np.testing.assert_allclose(forward(model)(params, tokens_of()), got, rtol=1e-5, atol=1e-6)


def test_token_types_change_logits():
    model, params = start(BERT)
    run = jax.jit(lambda types: model.apply({"params": params}, tokens_of(), token_types=types))
    default = jax.jit(lambda: model.apply({"params": params}, tokens_of()))()
    zero, one = (run(jnp.full_like(tokens_of(), n)) for n in (0, 1))
    np.testing.assert_allclose(default, zero, rtol=1e-5, atol=1e-6)
    assert jnp.abs(one - zero).max() > 1e-3


def test_pooling_in_bfloat16_averages_exactly():
    x = np.random.default_rng(0).normal(1, 1, (1, 300, 8)).astype(jnp.bfloat16)
    segments = np.repeat([[1, 2, 0]], [39, 257, 4], axis=1)
    got = pool(jnp.asarray(x), jnp.asarray(segments), MeanOfTokens())
    for document in (1, 2):
        expected = x[segments == document].astype(np.float64).mean(axis=0).astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            got[segments == document], np.broadcast_to(expected, (39 if document == 1 else 257, 8))
        )


def test_encoding_counts_positions_not_segment_ids():
    config = replace(BERT, positions=Learned(32))
    model, params = start(config)
    tokens = tokens_of()
    ones = jnp.ones_like(tokens).at[:, -2:].set(0)
    encode = partial(model.apply, {"params": params}, tokens, method="encode")
    expected, got = encode(ones).hidden, encode(3 * ones).hidden
    np.testing.assert_array_equal(got, expected)


def test_pooled_head_has_no_loss(refuses):
    model, params = start(replace(BERT, head=PooledConfig()))
    with refuses("model.head=Pooled has no logits"):
        model.apply({"params": params}, tokens_of(), tokens_of(), method="loss_terms")


def test_encoder_flops_match_hand_count():
    config = replace(ALBERT, head=MaskedLMConfig())
    layers = config.layer_flops(32)
    head = config.token_flops(100, 32) + replace(layers, weights=-layers.weights, attention=-layers.attention)
    assert head.weights == 2 * (8 * 16 + 16 * 8 + 8 * 100)


def test_encoder_config_rejects_invalid_values(refuses):
    for config, change, message in [
        (BERT, {"token_types": -1}, "token_types"),
        (ALBERT, {"depth": 5}, "num_param_groups=2"),
        (ALBERT, {"skip_first_attention_norm": True}, "skip_first_attention_norm"),
        (BERT, {"skip_first_attention_norm": True}, "skip_first_attention_norm"),
        (ALBERT, {"head": MaskedLMConfig(None)}, "head.dense"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(config, **change)
    with pytest.raises(ValueError, match="labels"):
        ClassifierConfig(0)
    with pytest.raises(ValueError, match="offset"):
        Learned(2, offset=2)
    with refuses("length 15", "positions.length=16", "offset=2"):
        BERT.check_length(15)
    BERT.check_length(14)
