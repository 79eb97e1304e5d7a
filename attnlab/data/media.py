"""Images and sounds in files, as the numbers that a model reads."""

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
    """The image (rows, columns, channels) or the sound (frames, mels) in a file, prepared as a model's are.

    Args:
      path: an image of any format that Pillow reads, made grey or coloured as the model's are; or a WAV file,
        whose channels are averaged.
      settings: of a `preprocessor_config.json`.
      shape: `ModelConfig.source_shape`, of an image or of audio.

    Raises:
      InputError: no such file, one of another kind, or a sound longer than the model hears at once.
    """
    file = epath.Path(path)
    if not file.exists():
        raise InputError(f"there is no file {path}")
    if source_kind(shape) == "audio":
        return _sound(file, LogMel.from_settings(settings))
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            picture = image.convert("L" if shape[-1] == 1 else "RGB")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image of a kind that can be read") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    return ImageProcessor.from_settings(settings)(picture)


def _sound(file: epath.Path, features: LogMel) -> Float[np.ndarray, "frames mels"]:
    try:
        with file.open("rb") as stream:
            rate, samples = wavfile.read(stream)
    except (ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read as a WAV file: {error}") from None
    sound = _as_floats(samples).reshape(len(samples), -1).mean(axis=1)
    common = gcd(rate, features.sample_rate)
    sound = resample_poly(sound, features.sample_rate // common, rate // common)
    if len(sound) > features.samples:
        raise InputError(
            f"{file} lasts {len(sound) / features.sample_rate:.1f} s, and the model hears "
            f"{features.chunk_seconds} at once"
        )
    return np.asarray(features(sound.astype(np.float32)[None])[0])


def _as_floats(samples: np.ndarray) -> np.ndarray:
    """Samples from -1 to 1; those of 8 bits are from 0 to 255."""
    if samples.dtype.kind == "f":
        return samples
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float64) - middle) / 2 ** (8 * samples.itemsize - 1)
