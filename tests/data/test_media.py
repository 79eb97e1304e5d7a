import io
import itertools
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from attnlab.data import media
from attnlab.data.audio import LogMel
from attnlab.data.images import ImageProcessor
from attnlab.errors import InputError

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


def turned(image, orientation):
    """Return an image as a file of this EXIF orientation stores it."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that turns upright to stored
    return image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_read_image_turns_it_upright(tmp_path, suffix):
    corners = Image.fromarray(np.kron([[0, 80], [160, 255]], np.ones((8, 8))).astype(np.uint8)).convert("RGB")
    settings = SQUARE | {"size": {"height": 16, "width": 16}}
    upright = ImageProcessor.from_settings(settings)(corners)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file, options = tmp_path / f"{orientation}.{suffix}", {"lossless": True} if suffix == "webp" else {}
        turned(corners, orientation).save(file, exif=exif, **options)
        got = media.read(file, settings, (16, 16, 3))
        np.testing.assert_allclose(got, upright, atol=0.1 if suffix == "jpg" else 0)


def test_read_image_converts_all_modes(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8))
    for mode in ("LA", "RGBA", "1", "CMYK", "YCbCr"):
        file = tmp_path / f"{mode}.tiff" if mode in ("CMYK", "YCbCr") else tmp_path / f"{mode}.png"
        image = rgb.convert(mode)
        image.save(file)
        expected = ImageProcessor.from_settings(SQUARE)(image.convert("RGB"))
        np.testing.assert_array_equal(media.read(file, SQUARE, IMAGE_SHAPE), expected)
    palette = rgb.quantize(8)
    palette.save(tmp_path / "p.png", transparency=bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = media.read(tmp_path / "p.png", SQUARE, IMAGE_SHAPE)
    np.testing.assert_array_equal(got, ImageProcessor.from_settings(SQUARE)(palette.convert("RGB")))


def test_read_image_of_16_bits(tmp_path):
    values = np.linspace(0, 65_535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    got = media.read(tmp_path / "x.png", SQUARE, (8, 8, 1))
    np.testing.assert_allclose(got[..., 0], np.rint(values / 257) / 255 * 2 - 1, atol=1e-6)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(columns: int, rows: int) -> bytes:
    """Return a PNG file that declares a size, with data of one row."""
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damaged_images():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga", "pcx", "jpeg2000"):
        stream = io.BytesIO()
        image.save(stream, kind)
        whole = stream.getvalue()
        for cut in (30, len(whole) // 2):
            yield f"{kind} cut at {cut}", whole[:cut]
        for seed in range(3):
            noisy, rng = bytearray(whole), np.random.default_rng(seed)
            for at in rng.integers(4, min(len(whole), 200), 5):
                noisy[at] = rng.integers(256)
            yield f"{kind} noise {seed}", bytes(noisy)
    yield "png bomb", png(65_535, 65_535)
    yield "png half a bomb", png(13_000, 13_000)
    yield (
        "gif bomb",
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;",
    )
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n"
    yield "ppm of 10^9", b"P5 1000000000 1000000000 255\n"
    yield "pfm of a NaN", b"Pf 2 1 -1.0\n" + np.array([np.nan, 1], "<f4").tobytes()


def test_damaged_images_give_one_line(tmp_path, recwarn):
    refused = 0
    for name, data in damaged_images():
        (tmp_path / "x").write_bytes(data)
        try:  # a decoder may also return a part of the image
            assert np.all(np.isfinite(media.read(tmp_path / "x", SQUARE, IMAGE_SHAPE))), name
        except InputError as error:
            assert "\n" not in str(error), name
            refused += 1
    assert refused > 30 and not recwarn


def test_oversized_images_are_reported(tmp_path, refuses):
    for side, words in (
        (9_000, "9000 x 9000 pixels; at most 67,108,864"),
        (13_000, "13000"),
        (65_535, "pixels"),
    ):
        (tmp_path / "x.png").write_bytes(png(side, side))
        with refuses("x.png", words):
            media.read(tmp_path / "x.png", SQUARE, IMAGE_SHAPE)


def wav(
    data=bytes(320), *, size=None, total=None, rate=16_000, channels=1, bits=16, tag=1, extra=b""
) -> bytes:
    """Return a WAV file whose header may lie."""
    block = min(channels * bits // 8, 2**16 - 1)
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block % 2**32, block, bits)
    body = b"fmt " + struct.pack("<I", len(form)) + form + extra
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body) if total is None else total) + b"WAVE" + body


def floats(*values: float, dtype="<f4") -> bytes:
    data = np.full(100, 0.1, dtype)
    data[: len(values)] = values
    return wav(data.tobytes(), tag=3, bits=8 * data.itemsize)


DAMAGED_SOUNDS = [
    (wav(b""), "has no samples"), (wav(size=0, total=0), "WAV file"), (wav()[:30], "WAV file"), (wav()[:20], "WAV"),
    (wav(size=0), "has no samples"), (wav(rate=0), "0 samples per second; 1 to 384,000"),
    (wav(rate=500_000), "has 500,000 samples per second"), (wav(rate=2**32 - 1), "WAV"), (wav(rate=1), "lasts 160.0 s; the model accepts at most 1 s"),
    (wav(channels=0), "WAV file"), (wav(bits=0), "WAV file"), (wav(tag=85), "WAV file"),
    (wav(extra=b"junk" + b"\xff" * 4), "WAV file"), (wav(bytes(3)), "WAV file"), (wav(channels=65_535), "WAV file"),
    *((floats(value), "not finite, or larger") for value in (np.nan, np.inf, -np.inf, 1e30)),
    (floats(1e300, dtype="<f8"), "not finite, or larger"), (b"RIFF", "WAV file"), (bytes(100), "WAV file"),
]  # fmt: skip


def test_damaged_sounds_give_one_line(tmp_path, refuses, recwarn):
    for number, (data, message) in enumerate(DAMAGED_SOUNDS):
        (tmp_path / f"{number}.wav").write_bytes(data)
        with refuses(f"{number}.wav", message):
            media.read(tmp_path / f"{number}.wav", SHORT, AUDIO_SHAPE)
    assert not recwarn


def test_folders_and_pipes_are_refused(tmp_path, refuses):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, settings, shape in itertools.product(("folder", "pipe"), (SQUARE,), (IMAGE_SHAPE, AUDIO_SHAPE)):
        with refuses(name, "it must be a regular file"):
            media.read(tmp_path / name, settings if shape == IMAGE_SHAPE else SHORT, shape)


def test_a_recording_from_a_pipe_is_read(tmp_path):
    samples = (sine(16_000) * 2**15).astype("<i2")
    (tmp_path / "pipe.wav").write_bytes(wav(samples.tobytes(), size=2**32 - 1, total=2**32 - 1))
    wavfile.write(tmp_path / "file.wav", 16_000, samples)
    pipe, file = (media.read(tmp_path / f"{name}.wav", SHORT, AUDIO_SHAPE) for name in ("pipe", "file"))
    np.testing.assert_array_equal(pipe, file)
