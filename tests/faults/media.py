"""Changed images, sounds and preprocessor settings."""

import io
import json
import os
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from scipy.io import wavfile

from tests.faults.harness import SOUND, VISION, Harness
from tests.faults.mutate import odd_bytes, odd_json, replace_file
from tests.faults.process import Result

IMAGE_SHAPE, SOUND_SHAPE = (8, 8, 3), (100, 8)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "DIB")
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F", "I", "LA", "YCbCr")
SIZES = (0, -1, 1, "x", None, 2.5, 10**6, 10**9, 2**63, [1, 2], {}, True, 10**400)


def image(rng: Random, harness: Harness, number: int) -> Result:
    """Read a changed image file."""
    folder = harness.folder()
    name, mode = rng.choice(FORMATS), rng.choice(MODES)
    data = _encoded(rng, name, mode)
    if rng.random() < 0.15:
        data, name = _bomb(rng), "bomb"
    elif rng.random() < 0.8:
        data = odd_bytes(rng, data)
    file = folder / "image.png"
    file.write_bytes(data)
    if rng.random() < 0.05:
        name = replace_file(rng, file)
    return _read(harness, folder, file, VISION, IMAGE_SHAPE).result(f"{mode} {name}")


def _encoded(rng: Random, name: str, mode: str) -> bytes:
    """Return an image of noise in a format of Pillow."""
    pixels = Image.fromarray(np.frombuffer(rng.randbytes(12 * 9 * 3), np.uint8).reshape(12, 9, 3))
    stream = io.BytesIO()
    try:
        converted = pixels.convert("I").convert(mode) if mode == "I;16" else pixels.convert(mode)
        converted.save(stream, name)
    except (ValueError, OSError, KeyError):  # the format does not have this mode
        pixels.save(stream, "PNG")
    return stream.getvalue()


def _bomb(rng: Random) -> bytes:
    """Return a small file that claims to be a huge image."""
    rows, columns = rng.choice(
        ((65535, 65535), (13000, 13000), (2**31 - 1, 1), (1, 10**7), (9000, 9000), (0, 5))
    )
    if rng.random() < 0.3:
        return b"GIF89a" + struct.pack("<HH", min(columns, 65535), min(rows, 65535)) + b"\x80\0\0" + bytes(6)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, rng.choice((0, 2, 6)), 0, 0, 0)
    body = zlib.compress(bytes(rng.choice((10, 10**6, 10**7))))
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**7))) if rng.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def sound(rng: Random, harness: Harness, number: int) -> Result:
    """Read a changed WAV file."""
    folder = harness.folder()
    file = folder / "sound.wav"
    kind = rng.choice((np.int16, np.uint8, np.int32, np.float32, np.float64))
    samples = np.array([rng.random() for _ in range(800)]).reshape(-1, rng.choice((1, 2)))
    values = samples if np.issubdtype(kind, np.floating) else samples * 100
    if np.issubdtype(kind, np.floating) and rng.random() < 0.3:
        values[3] = rng.choice((np.nan, np.inf, 1e38))
    wavfile.write(file, rng.choice((8000, 16000, 44100, 1, 2**27, 15999)), values.astype(kind))
    tried = f"{samples.shape} of {kind.__name__}"
    if rng.random() < 0.8:
        data = bytearray(file.read_bytes())
        if rng.random() < 0.6:  # a field of the header
            at, value = (
                rng.choice((4, 16, 20, 22, 24, 28, 32, 34, 40)),
                rng.choice((0, 1, 3, 255, 65535, 2**32 - 1)),
            )
            data[at : at + 4] = struct.pack("<I", value) if at in (4, 16, 24, 28, 40) else data[at : at + 4]
            data[at : at + 2] = struct.pack("<H", value & 0xFFFF)
            tried += f", {value} at byte {at}"
        else:
            data = bytearray(odd_bytes(rng, bytes(data)))
        file.write_bytes(data)
    if rng.random() < 0.05:
        tried = replace_file(rng, file)
    return _read(harness, folder, file, SOUND, SOUND_SHAPE).result(tried)


def preprocessor(rng: Random, harness: Harness, number: int) -> Result:
    """Read a right image or sound with a changed `preprocessor_config.json`."""
    folder = harness.folder()
    sounds = rng.random() < 0.5
    settings = dict(SOUND if sounds else VISION)
    text = odd_json(rng, settings)
    if rng.random() < 0.6:
        name = rng.choice(list(settings))
        settings[name] = rng.choice((*SIZES, {"height": rng.choice(SIZES), "width": rng.choice(SIZES)}))
        text = json.dumps(settings)
    (folder / "preprocessor_config.json").write_text(text, errors="surrogatepass")
    if sounds:
        wavfile.write(folder / "file", 16000, np.zeros(1000, np.int16))
    else:
        Image.new("RGB", (20, 10)).save(folder / "file", "PNG")
    shape = SOUND_SHAPE if sounds else IMAGE_SHAPE
    return _read(harness, folder, folder / "file", None, shape).result(text[:110])


def _read(harness: Harness, folder: Path, file: Path, settings: dict | None, shape: tuple[int, ...]):
    def use() -> None:
        from attnlab.data import media
        from attnlab.data import preprocessor as files

        used = files.read(folder) if settings is None else settings
        values = media.read(os.fspath(file), used, shape)
        if not np.isfinite(values).all():
            raise AssertionError("values that are not finite")

    return harness.call(folder, use)
