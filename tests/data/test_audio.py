"""Log-mel features compared with their definition and with transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data import preprocessor
from attnlab.data.audio import LogMel, mel_filters
from attnlab.errors import InputError
from attnlab.sharding import BATCH_AXES

RNG = np.random.default_rng(0)
SHORT = LogMel(chunk_seconds=2)
T = np.arange(3 * 16_000) / 16_000
AUDIO = {
    "noise": RNG.normal(size=T.size),
    "sine": np.sin(2 * np.pi * 440 * T),
    "quiet": 1e-3 * np.sin(2 * np.pi * 3000.3 * T),
    "loud and quiet": np.sin(2 * np.pi * 440 * T) + 1e-3 * np.sin(2 * np.pi * 5000 * T),
    "silence": np.zeros(T.size),
    "short": RNG.normal(size=7_001),
    "one sample": np.ones(1),
}


def expected_features(audio, config):
    """Compute Whisper's features in float64 with loops over frames and filters."""
    n, hop = config.n_fft, config.hop
    audio = np.asarray(audio, np.float32).astype(np.float64)[: config.samples]
    audio = np.concatenate([audio, np.zeros(config.samples - len(audio))])
    audio = np.concatenate([audio[n // 2 : 0 : -1], audio, audio[-2 : -n // 2 - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    phase = np.outer(np.arange(n // 2 + 1), np.arange(n)) / n
    dft = np.exp(-2j * np.pi * phase)
    features = np.zeros((config.frames, config.mels))
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
        power = np.abs(dft @ (window * audio[t * hop : t * hop + n])) ** 2
        features[t] = np.log10(np.maximum(weights @ power, 1e-10))
    return (np.maximum(features, features.max() - 8) + 4) / 4


def mel(hertz):
    return 3 * hertz / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) * 27 / np.log(6.4)


def hertz(mel):
    return 200 * mel / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27)


@pytest.mark.parametrize("name", AUDIO)
def test_features_match_definition(name):
    audio = jnp.asarray(AUDIO[name], jnp.float32)[None]
    got = jax.jit(SHORT)(audio)
    assert got.shape == (1, 200, 80) and got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], expected_features(AUDIO[name], SHORT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [
    LogMel(mels=128, chunk_seconds=1), LogMel(mels=20, n_fft=512, hop=128, chunk_seconds=1),
    LogMel(mels=40, n_fft=402, hop=500, chunk_seconds=1), LogMel(mels=40, sample_rate=22_050, chunk_seconds=1),
])  # fmt: skip
def test_features_match_definition_for_other_sizes(config):
    audio = AUDIO["noise"]
    got = config(jnp.asarray(audio, jnp.float32)[None])[0]
    np.testing.assert_allclose(got, expected_features(audio, config), atol=1e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("mels", [80, 128])
def test_features_match_transformers(mels):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=2)
    np.testing.assert_allclose(mel_filters(mels, 400, 16_000), extractor.mel_filters, atol=1e-12)
    for name, audio in AUDIO.items():
        expected = extractor(audio, sampling_rate=16_000, return_tensors="np").input_features[0].T
        got = LogMel(mels=mels, chunk_seconds=2)(jnp.asarray(audio, jnp.float32)[None])[0]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0, err_msg=name)


def test_batch_rows_are_independent():
    audio_batch = jnp.asarray(RNG.normal(size=(3, 20_000)) * np.array([[1], [1e-3], [0]]), jnp.float32)
    separate = jnp.concatenate([SHORT(audio[None]) for audio in audio_batch])
    np.testing.assert_allclose(SHORT(audio_batch), separate, atol=1e-5)
    np.testing.assert_array_equal(separate[2], -1.5)


def test_decades_limit_the_dynamic_range():
    audio = jnp.asarray(AUDIO["short"], jnp.float32)[None]
    few, many = LogMel(chunk_seconds=2, decades=3)(audio), SHORT(audio)
    assert few.max() == many.max()
    np.testing.assert_allclose(few, jnp.maximum(many, many.max() - 3 / 4), atol=1e-6)


def test_settings_of_checkpoint_roundtrip(tmp_path):
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


@pytest.mark.parametrize("settings, message", [
    ({"dither": 1e-4}, "has dither=0.0001; only 0.0 is supported"),
    ({"padding_value": 1.0}, "has padding_value=1.0; only 0.0"),
    ({"padding_side": "left"}, "has padding_side=left; only right"),
    ({"do_normalize": True}, "has do_normalize=True; only False"),
    ({"preemphasis": 0.97, "hop_length": 10}, "has unsupported settings: preemphasis$"),
    ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "of Wav2Vec2 are not supported, only those of Whisper"),
])  # fmt: skip
def test_unsupported_settings_are_rejected(settings, message):
    with pytest.raises(InputError, match=message):
        LogMel.from_settings(settings)


@pytest.mark.parametrize("sizes, message", [
    ({"hop": 0}, "hop must be over 0, not 0"),
    ({"n_fft": 16_002, "chunk_seconds": 1}, "n_fft must be an even number from 2 to the 16000 samples"),
    ({"n_fft": 401}, "n_fft must be an even number"),
    ({"hop": 480_001}, "hop=480001 at most the 480,000 samples"),
    ({"mels": 10**6}, "n_fft \\* mels must be at most"),
    ({"sample_rate": 10**9}, "sample_rate=1000000000 must be at most 384000"),
    ({"chunk_seconds": 10**9}, "chunk_seconds \\* sample_rate must be at most"),
    ({"hop": 1}, "n_fft \\* frames must be at most"),
    ({"mels": 300}, "mels=300 filters are too narrow for the frequencies of n_fft=400"),
])  # fmt: skip
def test_invalid_sizes_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**sizes)


@pytest.mark.parametrize(
    "text, message",
    [(None, "there is no preprocessor_config.json"), ("{", "is not JSON"), ("3", "must be a JSON object")],
)
def test_invalid_settings_file_is_rejected(tmp_path, text, message):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        preprocessor.read(tmp_path)


def test_features_do_not_depend_on_mesh(mesh_of):
    audio_batch = RNG.normal(size=(8, 20_000)).astype(np.float32)
    expected = SHORT(jnp.asarray(audio_batch))
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        got = jax.jit(SHORT)(jax.device_put(audio_batch, jax.P(BATCH_AXES)))
        assert jax.typeof(got).sharding.spec == jax.P(BATCH_AXES, None, None)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name, value", [
    *(("hop_length", value) for value in (0, -1, [1], 10**9)), *(("n_fft", value) for value in (10**9, "400", 2)),
    *(("feature_size", value) for value in (10**6, True, {}, 10**30)),
    *(("chunk_length", value) for value in (10**9, 0, 1.5)),
    *(("sampling_rate", value) for value in (10**9, 16000.5, 0)),
    ("feature_extractor_type", 5), ("feature_extractor_type", ["x"]), ("dither", "x" * 10**5),
])  # fmt: skip
def test_settings_of_wrong_type_or_size_are_refused(refuses, name, value):
    with refuses("preprocessor_config.json"):
        LogMel.from_settings({name: value})


def test_null_settings_have_their_defaults():
    assert LogMel.from_settings({"feature_size": None, "hop_length": None}) == LogMel()
