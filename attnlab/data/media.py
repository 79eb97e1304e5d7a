"""Read image and audio files as inputs of a model."""

import io
import warnings
from collections.abc import Mapping
from math import gcd
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.io import wavfile
from scipy.signal import resample_poly

from attnlab import untrusted
from attnlab.data.audio import MAX_RATE, LogMel
from attnlab.data.batch import source_kind
from attnlab.data.images import ImageProcessor, as_8bit
from attnlab.errors import InputError, shorten

MAX_BYTES = 256 * untrusted.MIB  # of a file
MAX_PIXELS = 1 << 26  # of an image before resizing
MAX_AMPLITUDE = 2.0**31  # larger samples would overflow the power spectrum in float32


def read(
    path: epath.PathLike, settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Return a preprocessed image (rows, columns, channels) or audio features (frames, mels).

    Args:
      path: an image in any format of Pillow except EPS, or a WAV file. An image is turned upright
        by its EXIF orientation and converted to 8-bit grey or RGB, as the model needs; see
        `as_8bit`. The channels of audio are averaged.
      settings: the content of a `preprocessor_config.json`.
      shape: `ModelConfig.source_shape`, of an image or of audio.

    Raises:
      InputError: the file does not exist, cannot be decoded, is too large, or has more audio than
        the model's input length.
    """
    file = epath.Path(path)
    if not file.exists():
        raise InputError(f"there is no file {path}")
    if source_kind(shape) == "audio":
        return _audio_features(file, LogMel.from_settings(settings))
    return ImageProcessor.from_settings(settings)(_read_image(file, "L" if shape[-1] == 1 else "RGB"))


def _read_image(file: epath.Path, mode: str) -> Image.Image:
    """Return the upright first frame of an image file in mode "L" or "RGB"."""
    data = io.BytesIO(untrusted.read_bytes(file, MAX_BYTES))
    Image.init()
    formats = [name for name in Image.ID if name != "EPS"]  # Pillow reads it by running Ghostscript
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked here; other warnings change nothing
        try:
            with Image.open(data, formats=formats) as image:
                columns, rows = image.size
                if columns * rows > MAX_PIXELS:
                    raise InputError(
                        f"{file} has {columns} x {rows} pixels; at most {MAX_PIXELS:,} pixels are allowed"
                    )
                ImageOps.exif_transpose(image, in_place=True)
                return as_8bit(image, mode)
        except InputError:
            raise
        except UnidentifiedImageError:
            raise InputError(f"{file} is not an image of a kind that can be read") from None
        except Exception as error:  # decoders of damaged files raise many types
            raise InputError(f"{file} cannot be read as an image: {_reason(error)}") from None


def _audio_features(file: epath.Path, features: LogMel) -> Float[np.ndarray, "frames mels"]:
    rate, audio = _read_wav(file, features.chunk_seconds)
    common = gcd(rate, features.sample_rate)
    audio = resample_poly(audio, features.sample_rate // common, rate // common)
    return np.asarray(features(audio.astype(np.float32)[None])[0])


def _read_wav(file: epath.Path, max_seconds: int) -> tuple[int, Float[np.ndarray, " samples"]]:
    """Return the sampling rate and the mean of the channels, in [-1, 1] for integer samples."""
    data = io.BytesIO(untrusted.read_bytes(file, MAX_BYTES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown chunks and of an early end
        try:
            rate, samples = wavfile.read(data)
        except Exception as error:  # a damaged header raises many types in SciPy
            raise InputError(f"{file} cannot be read as a WAV file: {_reason(error)}") from None
    if not 1 <= rate <= MAX_RATE:
        raise InputError(f"{file} has {rate:,} samples per second; 1 to {MAX_RATE:,} are supported")
    if not samples.size:
        raise InputError(f"{file} has no samples")
    if len(samples) > max_seconds * rate:
        raise InputError(
            f"{file} lasts {len(samples) / rate:.1f} s; the model accepts at most {max_seconds} s"
        )
    is_float = samples.dtype.kind == "f"
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinities are refused below
        audio = samples.reshape(len(samples), -1).mean(axis=1, dtype=None if is_float else np.float64)
    if not np.all(np.abs(audio) <= MAX_AMPLITUDE if is_float else True):
        raise InputError(f"{file} has samples that are not finite, or larger than {MAX_AMPLITUDE:g}")
    if not is_float:  # samples of 8 bits are unsigned
        middle = 128 if samples.dtype == np.uint8 else 0
        audio = (audio - middle) / 2 ** (8 * samples.itemsize - 1)
    return rate, audio


def _reason(error: Exception) -> str:
    """Return the message of a decoder's error; those of bugs in a decoder say nothing useful."""
    clear = isinstance(error, ValueError | OSError | SyntaxError | EOFError | Image.DecompressionBombError)
    return shorten(str(error), 160) if clear and str(error) else "its content is damaged"
