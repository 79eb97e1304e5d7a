"""Cross-attention and relative position bias in the layers of a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.attention import mask_fn
from attnlab.layers import AttentionConfig, Bidirectional, Causal, RelativeBias, Sliding
from attnlab.layers.attention import Documents, EncoderOutput, LayerSpec
from attnlab.layers.blocks import CrossAttentionConfig
from attnlab.models import DecoderConfig
from tests.jitted import Jitted

CONFIG = DecoderConfig(
    depth=3, width=16, attention=AttentionConfig(heads=4, kv_heads=2), positions=RelativeBias(8, 12)
)
SLIDING = dataclasses.replace(CONFIG, pattern=(Sliding(4), Sliding(9)))
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(1, 30, (2, 9)), jnp.int32)
MEMORY = EncoderOutput(
    jnp.asarray(RNG.normal(size=(2, 5, 12)), jnp.float32), Documents(jnp.array([[1] * 5, [1, 1, 1, 0, 0]]))
)


def decoder(config=CONFIG):
    """Return a decoder that cross-attends to MEMORY; large weights make attention non-uniform."""
    model = Jitted(config.build(30, cross=CrossAttentionConfig()))
    params = model.init(jax.random.key(0), TOKENS, memory=MEMORY)["params"]
    return model, jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)


def test_cross_attention_attends_to_all_but_padding():
    model, params = decoder()

    def loss(values):
        out = model.apply({"params": params}, TOKENS, memory=dataclasses.replace(MEMORY, hidden=values))
        return jnp.sum(jnp.sin(out))

    attended = np.abs(jax.grad(loss)(MEMORY.hidden)).max(-1) > 1e-6
    np.testing.assert_array_equal(attended, MEMORY.segments == 1)


def test_cross_attention_keeps_packed_documents_apart():
    model, params = decoder()
    segments = jnp.array([[1] * 4 + [2] * 5])
    memory = EncoderOutput(MEMORY.hidden[:1], Documents(jnp.array([[1, 1, 2, 2, 2]])))
    positions = jnp.array([[*range(4), *range(5)]])
    both = model.apply({"params": params}, TOKENS[:1], segments, positions, memory=memory)
    for own, part in ((slice(4), slice(2)), (slice(4, 9), slice(2, 5))):
        alone = EncoderOutput(memory.hidden[:, part], Documents(jnp.ones_like(memory.segments[:, part])))
        expected = model.apply({"params": params}, TOKENS[:1, own], memory=alone)
        np.testing.assert_allclose(both[:, own], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["causal", "sliding"])
def test_cross_attention_cache_repeats_full_forward(config):
    model, params = decoder(config)
    whole = model.apply({"params": params}, TOKENS, memory=MEMORY)
    cache = model.init_cache(2, 9)
    out, cache = model.apply({"params": params}, TOKENS[:, :4], cache=cache, memory=MEMORY)
    outs = [out]
    for i in range(4, 9):
        out, cache = model.apply({"params": params}, TOKENS[:, i : i + 1], cache=cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=1e-4, atol=1e-4)
    # Gathering rows also gathers their encoder output.
    swapped = cache.gather_rows(jnp.array([[1, 0]]))
    np.testing.assert_array_equal(swapped.context, cache.context[::-1])
    assert not np.array_equal(swapped.layers[0][0][1].key, cache.layers[0][0][1].key)


def test_relative_bias_is_invariant_to_position_shift():
    """Relative bias is the only source of order, so a shift of all positions has no effect."""
    model, params = decoder()
    positions = jnp.arange(9)[None] + jnp.zeros((2, 1), jnp.int32)
    expected = model.apply({"params": params}, TOKENS, None, positions, memory=MEMORY)
    shifted = model.apply({"params": params}, TOKENS, None, positions + 5, memory=MEMORY)
    np.testing.assert_array_equal(shifted, expected)

    def with_table(table):
        changed = {**params, "relative": {"table": table}}
        return model.apply({"params": changed}, TOKENS, memory=MEMORY)

    table = params["relative"]["table"]
    assert np.abs(with_table(0 * table) - expected).max() > 1e-3
    grads = jax.grad(lambda table: jnp.sum(jnp.sin(with_table(table))))(table)
    assert (np.abs(grads).max(-1) > 0).sum() >= 6  # nine tokens use at least six of the eight buckets


@pytest.mark.parametrize("mesh", ["data:2", "fsdp:2,tensor:2"])
def test_cross_attention_on_mesh_repeats_logits(mesh, mesh_of):
    model, params = decoder()
    expected = model.apply({"params": params}, TOKENS, memory=MEMORY)
    with jax.set_mesh(mesh_of(mesh)):
        tokens, segments = (sharding.constrain(x, "batch", None) for x in (TOKENS, MEMORY.segments))
        memory = EncoderOutput(sharding.constrain(MEMORY.hidden, "batch", None, None), Documents(segments))
        specs = jax.tree.map(
            lambda x: x.sharding.spec,
            jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, memory=memory))["params"],
        )
        placed = jax.tree.map(jax.sharding.reshard, params, specs)
        got = jax.jit(lambda p: model.apply({"params": p}, tokens, memory=memory))(placed)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Own(LayerSpec):
    """A layer spec as in an experiment's file, with a mask function of its own."""

    ahead: int = 0

    def mask(self, offset=0):
        """See `LayerSpec.mask`."""
        ends = jnp.arange(0, 4) * self.ahead  # an array, traced where `mask` is called in a program
        return mask_fn(lambda b, h, q, k: k <= q + offset + ends[3])


@pytest.mark.parametrize("ahead", [0, 2])
def test_causal_is_derived_from_the_mask_of_an_own_spec(ahead):
    assert [spec.causal for spec in (Causal(), Sliding(3), Bidirectional(), Bidirectional(2, 0))] == [
        True,
        True,
        False,
        True,
    ]
    config = DecoderConfig(
        depth=2, width=16, attention=AttentionConfig(heads=2), pattern=(Causal(), Own(ahead))
    )
    assert config.causal == (ahead == 0)

    @jax.jit
    def traced():
        assert Own(ahead).causal == (ahead == 0)

    traced()
