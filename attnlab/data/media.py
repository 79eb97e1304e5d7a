"""Read image and audio files as inputs of a model."""

from collections.abc import Mapping
from math import gcd
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from scipy.io import wavfile
from scipy.signal import resample_poly

from attnlab.data.audio import LogMel
from attnlab.data.batch import source_kind
from attnlab.data.images import ImageProcessor
from attnlab.errors import InputError


def read(
    path: epath.PathLike, settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Return a preprocessed image (rows, columns, channels) or audio features (frames, mels).

    Args:
      path: an image in any format of Pillow, converted to grey or RGB as the model needs; or a WAV
        file, whose channels are averaged.
      settings: the content of a `preprocessor_config.json`.
      shape: `ModelConfig.source_shape`, of an image or of audio.

    Raises:
      InputError: the file does not exist, has another format, or has more audio than the model's
        input length.
    """
    file = epath.Path(path)
    if not file.exists():
        raise InputError(f"there is no file {path}")
    if source_kind(shape) == "audio":
        return _audio_features(file, LogMel.from_settings(settings))
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            converted = image.convert("L" if shape[-1] == 1 else "RGB")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image of a kind that can be read") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    return ImageProcessor.from_settings(settings)(converted)


def _audio_features(file: epath.Path, features: LogMel) -> Float[np.ndarray, "frames mels"]:
    try:
        with file.open("rb") as stream:
            rate, samples = wavfile.read(stream)
    except (ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read as a WAV file: {error}") from None
    audio = _as_floats(samples).reshape(len(samples), -1).mean(axis=1)
    common = gcd(rate, features.sample_rate)
    audio = resample_poly(audio, features.sample_rate // common, rate // common)
    if len(audio) > features.samples:
        raise InputError(
            f"{file} lasts {len(audio) / features.sample_rate:.1f} s; the model accepts at most "
            f"{features.chunk_seconds} s"
        )
    return np.asarray(features(audio.astype(np.float32)[None])[0])


def _as_floats(samples: np.ndarray) -> np.ndarray:
    """Return samples in [-1, 1]. Samples of 8 bits are unsigned."""
    if samples.dtype.kind == "f":
        return samples
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float64) - middle) / 2 ** (8 * samples.itemsize - 1)
