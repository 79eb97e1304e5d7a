"""Chunked prefill gives the same decode state as prefill in one pass."""

import jax
import numpy as np
import pytest

from attnlab import sharding
from attnlab.generation import decode_state
from attnlab.layers import AttentionConfig, RelativeBias
from attnlab.models import DecoderConfig, RecurrentConfig
from tests.generation.test_generate import CONFIG, generator

MODELS = {
    "sliding window": CONFIG,
    "relative bias": DecoderConfig(
        depth=2, width=16, attention=AttentionConfig(heads=4), positions=RelativeBias()
    ),
    "recurrent": RecurrentConfig(depth=2, width=16),
}


def run_prefill(g, chunk: int, monkeypatch):
    """Prefill prompts of unequal lengths; return the state and the bytes of temporary buffers."""
    monkeypatch.setattr(decode_state, "PREFILL_CHUNK", chunk)
    # Jit a new function, since the cache of `prefill` may have a program of another chunk size.
    prefill = jax.jit(lambda *args: decode_state.prefill.__wrapped__(*args), static_argnums=(0, 1))
    lengths = np.array([256, 3, 160, 64, 65, 200, 1, 130])
    tokens = np.random.default_rng(0).integers(0, 200, (8, 256), np.int32)
    segments = (np.arange(256) >= 256 - lengths[:, None]).astype(np.int32)
    with jax.set_mesh(g.mesh):
        args = jax.device_put((tokens, segments), sharding.named_sharding(g.mesh, jax.P(sharding.BATCH_AXES)))
        program = prefill.lower(g.model, 272, g.params, *args).compile()
        return program(g.params, *args), program.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mesh", ["single", "data:2,fsdp:2,tensor:2"])
def test_chunked_prefill_matches_single_pass_with_less_memory(kind, mesh, mesh_of, monkeypatch):
    g = generator(mesh_of(mesh), MODELS[kind])
    (single_pass, max_bytes), (chunked, chunked_bytes) = (
        run_prefill(g, 8 * length, monkeypatch) for length in (256, 32)
    )
    assert chunked_bytes < 0.8 * max_bytes
    assert jax.tree.structure(single_pass) == jax.tree.structure(chunked)
    for expected, actual in zip(*map(jax.tree.leaves, (single_pass, chunked)), strict=True):
        assert jax.typeof(expected) == jax.typeof(actual)
        np.testing.assert_allclose(expected, actual, rtol=1e-4, atol=1e-4)
