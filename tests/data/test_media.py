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
SEEN, HEARD = (8, 8, 3), (100, 8)


def sine(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_read_as_its_settings_say(tmp_path, mode, channels):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)).convert(mode)
    picture.save(tmp_path / "x.png")
    found = media.read(tmp_path / "x.png", SQUARE, (8, 8, channels))
    expected = ImageProcessor.from_settings(SQUARE)(picture.convert({1: "L", 3: "RGB"}[channels]))
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (8, 8, channels)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_is_read_as_numbers_from_minus_1_to_1(tmp_path, dtype, channels):
    sound = sine(16_000)
    kept = sound.astype(dtype)
    if dtype != "float32":
        middle = 128 if dtype == "uint8" else 0
        kept = np.round(sound * np.iinfo(dtype).max / (2 if dtype == "uint8" else 1) + middle).astype(dtype)
    wavfile.write(tmp_path / "x.wav", 16_000, np.stack([kept] * channels, axis=-1).squeeze())
    found = media.read(tmp_path / "x.wav", SHORT, HEARD)
    assert found.shape == (100, 8)
    # Loud filters: what is quiet hears the rounding to 8 bits.
    expected = np.asarray(LogMel.from_settings(SHORT)(sound[None].astype(np.float32))[0])
    loud = expected > expected.max() - 0.5
    np.testing.assert_allclose(found[loud], expected[loud], atol=0.02)


def test_a_sound_of_another_rate_is_resampled(tmp_path):
    wavfile.write(tmp_path / "x.wav", 44_100, sine(44_100).astype(np.float32))
    found = media.read(tmp_path / "x.wav", SHORT, HEARD)
    expected = np.asarray(LogMel.from_settings(SHORT)(sine(16_000)[None].astype(np.float32))[0])
    loud = expected > expected.max() - 0.5
    assert loud[:45].any(axis=1).all()
    np.testing.assert_allclose(found[loud], expected[loud], atol=0.02)


def test_what_cannot_be_read_is_told_in_a_line(tmp_path, refuses):
    (tmp_path / "text").write_text("no picture, no sound")
    (tmp_path / "empty").touch()
    wavfile.write(tmp_path / "long.wav", 16_000, np.zeros(40_000, np.int16))
    with refuses("there is no file"):
        media.read(tmp_path / "nowhere.png", SQUARE, SEEN)
    for name in ("text", "empty"):
        with refuses(f"{name} is not an image"):
            media.read(tmp_path / name, SQUARE, SEEN)
        with refuses(f"{name} cannot be read as a WAV file"):
            media.read(tmp_path / name, SHORT, HEARD)
    with refuses("lasts 2.5 s; the model accepts at most 1 s"):
        media.read(tmp_path / "long.wav", SHORT, HEARD)
