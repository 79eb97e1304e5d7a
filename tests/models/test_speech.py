import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.layers import AttentionConfig
from attnlab.models import DecoderConfig, Seq2SeqConfig, SpeechEncoderConfig
from attnlab.models.speech import sinusoids
from attnlab.train import Experiment
from tests.data.toys import Sounds

ENCODER = SpeechEncoderConfig(
    depth=2, width=16, attention=AttentionConfig(heads=4, bias="qvo"), mels=4, frames=12
)
CONFIG = Seq2SeqConfig(ENCODER, DecoderConfig(depth=1, width=16, attention=AttentionConfig(heads=2)))
SOUND = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 5)), jnp.int32)


def start():
    model = CONFIG.build(11)
    params = jax.jit(partial(model.init, source=SOUND))(jax.random.key(0), TOKENS)["params"]
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, params)


def test_padding_frames_do_not_change_encoder_output():
    model, params = start()
    run = jax.jit(
        lambda sound, segments=None: model.apply(
            {"params": params}, TOKENS, source=sound, source_segments=segments
        )
    )
    segments = jnp.array([[1] * 12, [1] * 7 + [0] * 5], jnp.int32)
    got = run(SOUND, segments)
    np.testing.assert_allclose(got[0], run(SOUND)[0], atol=1e-5)
    np.testing.assert_allclose(got[1], run(SOUND[:, :7])[1], atol=1e-5)
    other = run(jnp.where(segments[..., None] > 0, SOUND, 9.0), segments)
    np.testing.assert_array_equal(other, got)
    assert np.abs(got[1] - run(SOUND)[1]).max() > 1e-3


def test_position_table_is_not_trained():
    model, params = start()
    np.testing.assert_array_equal(params["encoder"]["position_embedding"], sinusoids(6, 16))
    gradient = jax.jit(jax.grad(lambda params: model.apply({"params": params}, TOKENS, source=SOUND).std()))(
        params
    )
    assert (gradient["encoder"]["position_embedding"] == 0).all()
    ((pattern, factor),) = CONFIG.learning_rate_multipliers().items()
    names = ("encoder/position_embedding", "decoder/position_embedding/table", "encoder/norm/scale")
    assert [bool(re.search(pattern, name)) for name in names] == [True, False, False] and factor == 0


def test_speech_encoder_flops_match_compiled_program():
    config = replace(ENCODER, width=256, scan=False, frames=64, mels=40)
    sound, segments = jnp.zeros((2, 64, 40)), jnp.ones((2, 64), jnp.int32)
    encode = partial(config.build(1).apply, method="encode")
    params = jax.eval_shape(
        partial(config.build(1).init, method="encode"), jax.random.key(0), sound, segments
    )
    counted = config.source_flops(64)
    flops = jax.jit(encode).lower(params, sound, segments).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(2 * (counted.weights + counted.attention), rel=0.06)
    values = jax.eval_shape(lambda *inputs: encode(*inputs).hidden, params, sound, segments)
    assert config.encoder_output_shape(64) == values.shape[1:]


@pytest.mark.parity
def test_sinusoids_match_transformers():
    whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    np.testing.assert_allclose(sinusoids(50, 12), whisper.sinusoids(50, 12).numpy(), atol=1e-5)


def test_speech_encoder_rejects_invalid_configs_and_inputs(refuses):
    model, params = start()
    with refuses("at most 12 frames of 4 mels", "14 of 4"):
        model.apply({"params": params}, TOKENS, source=jnp.zeros((2, 14, 4)))
    with refuses("12 frames of 4 mels", "12 of 5"):
        model.apply({"params": params}, TOKENS, source=jnp.zeros((2, 12, 5)))
    with refuses("no logits to train", "Seq2Seq"):
        Experiment(model=ENCODER, data=Sounds())
    with pytest.raises(ValueError, match="even"):
        replace(ENCODER, frames=11)
