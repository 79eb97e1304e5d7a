"""A prompt that is read a piece after the other is as read at once."""

import jax
import numpy as np
import pytest

from attnlab import sharding
from attnlab.generation import decode_state
from attnlab.layers import AttentionConfig, RelativeBias
from attnlab.models import DecoderConfig, RecurrentConfig
from tests.generation.test_generate import CONFIG, generator

MODELS = {
    "windows": CONFIG,
    "distances": DecoderConfig(
        depth=2, width=16, attention=AttentionConfig(heads=4), positions=RelativeBias()
    ),
    "recurrent": RecurrentConfig(depth=2, width=16),
}


def read(g, at_once: int, monkeypatch):
    """What is read of prompts of unequal lengths, and the bytes of activations that it takes."""
    monkeypatch.setattr(decode_state, "PREFILL_CHUNK", at_once)
    # A function of its own, which has no program of another size yet.
    prefill = jax.jit(lambda *given: decode_state.prefill.__wrapped__(*given), static_argnums=(0, 1))
    lengths = np.array([256, 3, 160, 64, 65, 200, 1, 130])
    tokens = np.random.default_rng(0).integers(0, 200, (8, 256), np.int32)
    segments = (np.arange(256) >= 256 - lengths[:, None]).astype(np.int32)
    with jax.set_mesh(g.mesh):
        given = jax.device_put((tokens, segments), sharding.named_sharding(g.mesh, jax.P(("data", "fsdp"))))
        program = prefill.lower(g.model, 272, g.params, *given).compile()
        return program(g.params, *given), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mesh", ["single", "data:2,fsdp:2,tensor:2"])
def test_pieces_make_the_whole(kind, mesh, mesh_of, monkeypatch):
    g = generator(mesh_of(mesh), MODELS[kind])
    (whole, most), (pieces, less) = (read(g, 8 * length, monkeypatch) for length in (256, 32))
    assert less < 0.8 * most
    assert jax.tree.structure(whole) == jax.tree.structure(pieces)
    for one, other in zip(*map(jax.tree.leaves, (whole, pieces)), strict=True):
        assert jax.typeof(one) == jax.typeof(other)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
