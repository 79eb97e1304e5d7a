"""Log-mel features: against their definition, and against the library they come from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import preprocessor
from attnlab.data.audio import LogMel, mel_filters
from attnlab.errors import InputError

RNG = np.random.default_rng(0)
SHORT = LogMel(chunk_seconds=2)
T = np.arange(3 * 16_000) / 16_000
SOUNDS = {
    "noise": RNG.normal(size=T.size),
    "sine": np.sin(2 * np.pi * 440 * T),
    "quiet": 1e-3 * np.sin(2 * np.pi * 3000.3 * T),
    "loud and quiet": np.sin(2 * np.pi * 440 * T) + 1e-3 * np.sin(2 * np.pi * 5000 * T),
    "silence": np.zeros(T.size),
    "short": RNG.normal(size=7_001),
    "one sample": np.ones(1),
}


def by_definition(sound, config):
    """Whisper's features in float64, a frame and a filter at a time."""
    n, hop = config.n_fft, config.hop
    sound = np.asarray(sound, np.float32).astype(np.float64)[: config.samples]
    sound = np.concatenate([sound, np.zeros(config.samples - len(sound))])
    sound = np.concatenate([sound[n // 2 : 0 : -1], sound, sound[-2 : -n // 2 - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    place = np.outer(np.arange(n // 2 + 1), np.arange(n)) / n
    dft = np.exp(-2j * np.pi * place)
    out = np.zeros((config.frames, config.mels))
    edges = np.linspace(0, mel(8000.0), config.mels + 2)
    weights = np.zeros((config.mels, n // 2 + 1))
    for m in range(config.mels):
        low, middle, high = (hertz(edges[m + i]) for i in range(3))
        for f in range(n // 2 + 1):
            hz = f * config.sample_rate / n
            if low < hz < high:
                up, down = (hz - low) / (middle - low), (high - hz) / (high - middle)
                weights[m, f] = min(up, down) * 2 / (high - low)
    for t in range(config.frames):
        power = np.abs(dft @ (window * sound[t * hop : t * hop + n])) ** 2
        out[t] = np.log10(np.maximum(weights @ power, 1e-10))
    return (np.maximum(out, out.max() - 8) + 4) / 4


def mel(hertz):
    return 3 * hertz / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) * 27 / np.log(6.4)


def hertz(mel):
    return 200 * mel / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27)


@pytest.mark.parametrize("name", SOUNDS)
def test_features_are_those_of_the_definition(name):
    sound = jnp.asarray(SOUNDS[name], jnp.float32)[None]
    got = jax.jit(SHORT)(sound)
    assert got.shape == (1, 200, 80) and got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], by_definition(SOUNDS[name], SHORT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [
    LogMel(mels=128, chunk_seconds=1), LogMel(mels=20, n_fft=512, hop=128, chunk_seconds=1),
    LogMel(mels=40, n_fft=402, hop=500, chunk_seconds=1), LogMel(mels=40, sample_rate=22_050, chunk_seconds=1),
])  # fmt: skip
def test_other_numbers(config):
    sound = SOUNDS["noise"]
    got = config(jnp.asarray(sound, jnp.float32)[None])[0]
    np.testing.assert_allclose(got, by_definition(sound, config), atol=1e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_transformers(mels):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=2)
    np.testing.assert_allclose(mel_filters(mels, 400, 16_000), theirs.mel_filters, atol=1e-12)
    for name, sound in SOUNDS.items():
        expected = theirs(sound, sampling_rate=16_000, return_tensors="np").input_features[0].T
        got = LogMel(mels=mels, chunk_seconds=2)(jnp.asarray(sound, jnp.float32)[None])[0]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0, err_msg=name)


def test_sounds_of_a_batch_do_not_touch_each_other():
    sounds = jnp.asarray(RNG.normal(size=(3, 20_000)) * np.array([[1], [1e-3], [0]]), jnp.float32)
    each = jnp.concatenate([SHORT(sound[None]) for sound in sounds])
    np.testing.assert_allclose(SHORT(sounds), each, atol=1e-5)
    np.testing.assert_array_equal(each[2], -1.5)


def test_decades_are_kept_below_the_loudest():
    sound = jnp.asarray(SOUNDS["short"], jnp.float32)[None]
    few, many = LogMel(chunk_seconds=2, decades=3)(sound), SHORT(sound)
    assert few.max() == many.max()
    np.testing.assert_allclose(few, jnp.maximum(many, many.max() - 3 / 4), atol=1e-6)


def test_settings_of_a_checkpoint(tmp_path):
    assert LogMel.from_settings({}) == LogMel()
    settings = {
        "chunk_length": 15, "dither": 0.0, "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128, "hop_length": 80, "n_fft": 512, "n_samples": 240000, "nb_max_frames": 1500,
        "padding_side": "right", "padding_value": 0.0, "processor_class": "WhisperProcessor",
        "return_attention_mask": False, "sampling_rate": 8000 * 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    got = LogMel.from_settings(preprocessor.read(tmp_path))
    assert got == LogMel(mels=128, sample_rate=16_000, n_fft=512, hop=80, chunk_seconds=15)
    assert (got.samples, got.frames) == (settings["n_samples"], 3000)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert LogMel.from_settings(preprocessor.read(tmp_path)) == got
    assert LogMel.from_settings(got.settings()) == got


@pytest.mark.parametrize("settings, told", [
    ({"dither": 1e-4}, "has dither=0.0001; only 0.0 is supported"),
    ({"padding_value": 1.0}, "has padding_value=1.0; only 0.0"),
    ({"padding_side": "left"}, "has padding_side=left; only right"),
    ({"do_normalize": True}, "has do_normalize=True; only False"),
    ({"preemphasis": 0.97, "hop_length": 10}, "has unsupported settings: preemphasis$"),
    ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "of Wav2Vec2 are not supported, only those of Whisper"),
])  # fmt: skip
def test_settings_that_are_not_done_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        LogMel.from_settings(settings)


@pytest.mark.parametrize("numbers, told", [
    ({"hop": 0}, "hop must be over 0, not 0"),
    ({"n_fft": 500_000}, "n_fft must be an even number from 2 to the 480000 samples"),
    ({"n_fft": 401}, "n_fft must be an even number"),
    ({"mels": 300}, "mels=300 filters are too narrow for the frequencies of n_fft=400"),
])  # fmt: skip
def test_numbers_that_cannot_be(numbers, told):
    with pytest.raises(ValueError, match=told):
        LogMel(**numbers)


@pytest.mark.parametrize(
    "text, told",
    [(None, "there is no preprocessor_config.json"), ("{", "is not JSON"), ("3", "must be a JSON object")],
)
def test_a_file_that_cannot_be_read(tmp_path, text, told):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=told):
        preprocessor.read(tmp_path)


def test_on_a_mesh(mesh_of):
    sounds = RNG.normal(size=(8, 20_000)).astype(np.float32)
    expected = SHORT(jnp.asarray(sounds))
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        got = jax.jit(SHORT)(jax.device_put(sounds, jax.P(("data", "fsdp"))))
        assert jax.typeof(got).sharding.spec == jax.P(("data", "fsdp"), None, None)
    np.testing.assert_allclose(got, expected, atol=1e-5)
