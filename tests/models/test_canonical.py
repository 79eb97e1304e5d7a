"""Tests of attnlab/models/canonical.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import AttentionConfig, Bidirectional, Causal, MLPConfig, Rotary, Sliding
from attnlab.models import CaptionerConfig, ClassifierConfig, DecoderConfig, EncoderConfig, Seq2SeqConfig
from attnlab.models.canonical import canonical

SMALL = DecoderConfig(depth=2, width=16, attention=AttentionConfig(heads=2))


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.5},
        {"remat": "full"},
        {"scan": False},
        {"unrolled": True},
        {"pattern": (Causal(), Causal())},
        {"pattern": (Causal(positions=Rotary()),)},
        {"feed_forward": MLPConfig(64)},
        {"attention": AttentionConfig(heads=2, kv_heads=2, head_dim=8, dropout=0.1)},
    ],
    ids=str,
)
def test_configs_of_one_function_have_one_canonical_form(change):
    assert canonical(replace(SMALL, **change)) == canonical(SMALL)
    assert canonical(canonical(SMALL)) == canonical(SMALL)


@pytest.mark.parametrize(
    "change",
    [{"pattern": (Causal(), Sliding(3))}, {"depth": 3}, {"tied": False}, {"layer_scale": 1.0}],
    ids=str,
)
def test_configs_of_different_functions_have_different_canonical_forms(change):
    assert canonical(replace(SMALL, **change)) != canonical(SMALL)


def test_canonical_form_includes_the_parts_of_a_model():
    encoder = EncoderConfig(head=ClassifierConfig(dropout=0.3), dropout=0.1, pattern=(Bidirectional(),) * 6)
    both = Seq2SeqConfig(encoder, replace(SMALL, dropout=0.1))
    plain = Seq2SeqConfig(EncoderConfig(head=ClassifierConfig()), SMALL)
    assert canonical(both) == canonical(plain)


def test_layers_that_share_parameters_keep_their_pattern():
    config = EncoderConfig(depth=4, pattern=(Bidirectional(), Bidirectional(2, 2)), num_param_groups=1)
    assert canonical(config).pattern == config.pattern


@pytest.mark.parametrize("depth", [2, 3])
def test_unrolled_layers_keep_parameters_and_caches_apart(depth):
    config = replace(SMALL, depth=depth, pattern=(Sliding(3), Causal()), unrolled=True)
    model, tokens = config.build(11), jnp.arange(5)[None]
    params = model.init(jax.random.key(0), tokens)["params"]
    assert set(params["layers"]) == {"tail"} and len(params["layers"]["tail"]) == depth
    logits = model.apply({"params": params}, tokens)
    cached, cache = model.apply({"params": params}, tokens, cache=model.init_cache(1, 5))
    np.testing.assert_allclose(cached, logits, rtol=1e-5, atol=1e-6)
    assert cache.layers[0] is None and len(cache.layers[1]) == depth


def test_all_parts_of_a_model_are_unrolled_unless_they_share_parameters():
    config = CaptionerConfig().with_unrolled_layers()
    assert config.encoder.unrolled and config.decoder.unrolled
    shared = EncoderConfig(depth=2, num_param_groups=1)
    assert shared.with_unrolled_layers() == shared
    with pytest.raises(ValueError, match="unrolled=true needs num_param_groups=none"):
        replace(shared, unrolled=True)
