import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from attnlab.data import media
from attnlab.data.audio import LogMel
from attnlab.data.images import ImageProcessor

SQUARE = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": 0.5,
    "image_std": 0.5,
}
SHORT = {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 1, "feature_size": 8}
IMAGE_SHAPE, AUDIO_SHAPE = (8, 8, 3), (100, 8)


def sine(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_read_image_converts_to_model_channels(tmp_path, mode, channels):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)).convert(mode)
    image.save(tmp_path / "x.png")
    features = media.read(tmp_path / "x.png", SQUARE, (8, 8, channels))
    expected = ImageProcessor.from_settings(SQUARE)(image.convert({1: "L", 3: "RGB"}[channels]))
    np.testing.assert_array_equal(features, expected)
    assert features.shape == (8, 8, channels)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_read_audio_scales_samples_to_unit_range(tmp_path, dtype, channels):
    audio = sine(16_000)
    samples = audio.astype(dtype)
    if dtype != "float32":
        zero = 128 if dtype == "uint8" else 0
        samples = np.round(audio * np.iinfo(dtype).max / (2 if dtype == "uint8" else 1) + zero).astype(dtype)
    wavfile.write(tmp_path / "x.wav", 16_000, np.stack([samples] * channels, axis=-1).squeeze())
    features = media.read(tmp_path / "x.wav", SHORT, AUDIO_SHAPE)
    assert features.shape == (100, 8)
    # Compare loud mel bins only: rounding to 8 bits changes quiet ones.
    expected = np.asarray(LogMel.from_settings(SHORT)(audio[None].astype(np.float32))[0])
    loud = expected > expected.max() - 0.5
    np.testing.assert_allclose(features[loud], expected[loud], atol=0.02)


def test_read_audio_resamples(tmp_path):
    wavfile.write(tmp_path / "x.wav", 44_100, sine(44_100).astype(np.float32))
    features = media.read(tmp_path / "x.wav", SHORT, AUDIO_SHAPE)
    expected = np.asarray(LogMel.from_settings(SHORT)(sine(16_000)[None].astype(np.float32))[0])
    loud = expected > expected.max() - 0.5
    assert loud[:45].any(axis=1).all()
    np.testing.assert_allclose(features[loud], expected[loud], atol=0.02)


def test_unreadable_files_are_reported(tmp_path, refuses):
    (tmp_path / "text").write_text("neither image nor audio")
    (tmp_path / "empty").touch()
    wavfile.write(tmp_path / "long.wav", 16_000, np.zeros(40_000, np.int16))
    with refuses("there is no file"):
        media.read(tmp_path / "nowhere.png", SQUARE, IMAGE_SHAPE)
    for name in ("text", "empty"):
        with refuses(f"{name} is not an image"):
            media.read(tmp_path / name, SQUARE, IMAGE_SHAPE)
        with refuses(f"{name} cannot be read as a WAV file"):
            media.read(tmp_path / name, SHORT, AUDIO_SHAPE)
    with refuses("lasts 2.5 s; the model accepts at most 1 s"):
        media.read(tmp_path / "long.wav", SHORT, AUDIO_SHAPE)
