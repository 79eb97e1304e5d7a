"""Log-mel spectrograms of audio, as in Whisper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab import untrusted
from attnlab.data import preprocessor
from attnlab.errors import InputError, shorten

TOP_HZ = 8000.0  # upper edge of the highest filter, at any sampling rate
FLOOR = 1e-10  # minimum power, that of silence
MAX_RATE = 384_000  # samples per second
MAX_VALUES = 1 << 24  # of a chunk, of its frames or of the filters: 14 times those of Whisper

# Setting -> field. Other settings must have the only supported value.
_FIELDS = {
    "feature_size": "mels",
    "sampling_rate": "sample_rate",
    "hop_length": "hop",
    "chunk_length": "chunk_seconds",
    "n_fft": "n_fft",
}
_ONLY = {"dither": 0.0, "padding_value": 0.0, "padding_side": "right", "do_normalize": False}
_DERIVED = {"mel_filters", "n_samples", "nb_max_frames"}  # in older files, computed from the others


@dataclass(frozen=True)
class LogMel:
    """Log-mel spectrogram of audio (Whisper, arXiv 2212.04356, section 2.2).

    Attributes:
      mels: number of mel filters; 80, or 128 since large-v3.
      sample_rate: samples per second.
      n_fft: samples per frame and length of the window.
      hop: samples between consecutive frames.
      chunk_seconds: length of a chunk; audio is truncated or padded with silence.
      decades: dynamic range below the maximum of the chunk, in powers of ten.
    """

    mels: int = 80
    sample_rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    chunk_seconds: int = 30
    decades: float = 8.0

    def __post_init__(self):
        for name in ("mels", "sample_rate", "hop", "chunk_seconds", "decades"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be over 0, not {getattr(self, name)}")
        if self.sample_rate > MAX_RATE or self.hop > self.samples:
            raise ValueError(
                f"sample_rate={self.sample_rate} must be at most {MAX_RATE}, and hop={self.hop} at most the "
                f"{self.samples:,} samples of a chunk"
            )
        sizes = {
            "chunk_seconds * sample_rate": self.samples,
            "n_fft * frames": self.n_fft * self.frames,
            "n_fft * mels": self.n_fft * self.mels,
        }
        for name, size in sizes.items():
            if size > MAX_VALUES:
                raise ValueError(f"{name} must be at most {MAX_VALUES:,}, not {size:,}")
        if not 2 <= self.n_fft <= self.samples or self.n_fft % 2:
            raise ValueError(
                f"n_fft must be an even number from 2 to the {self.samples} samples of a chunk, "
                f"not {self.n_fft}"
            )
        if not mel_filters(self.mels, self.n_fft, self.sample_rate).any(axis=0).all():
            raise ValueError(
                f"mels={self.mels} filters are too narrow for the frequencies of n_fft={self.n_fft} at "
                f"sample_rate={self.sample_rate}: some would be empty"
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "LogMel":
        """Return the feature extractor of a checkpoint from the settings of `preprocessor.read`.

        Raises:
          InputError: the feature extractor is not Whisper's, or a setting is not supported.
        """
        kind = preprocessor.processor_class(settings)
        if kind not in (None, "Whisper"):
            raise InputError(f"the audio features of {kind} are not supported, only those of Whisper")
        preprocessor.check_known(settings, {*_FIELDS, *_ONLY, *_DERIVED})
        for name, value in _ONLY.items():
            if settings.get(name) not in (None, value):
                given = shorten(str(settings[name]))
                raise InputError(f"{preprocessor.CONFIG_FILE} has {name}={given}; only {value} is supported")
        sizes = preprocessor.check_types(settings, dict.fromkeys(_FIELDS, untrusted.integer(1, 1 << 25)))
        try:
            return cls(**{_FIELDS[name]: size for name, size in sizes.items()})
        except ValueError as error:
            raise InputError(f"{preprocessor.CONFIG_FILE}: {error}") from None

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes this object."""
        named = {name: getattr(self, field) for name, field in _FIELDS.items()}
        return {"feature_extractor_type": "WhisperFeatureExtractor", **named, **_ONLY}

    @property
    def samples(self) -> int:
        """Samples per chunk."""
        return self.chunk_seconds * self.sample_rate

    @property
    def frames(self) -> int:
        """Frames per chunk, the length of the result."""
        return self.samples // self.hop

    def __call__(self, audio: Float[Array, "B samples"]) -> Float[Array, "B frames mels"]:
        """Return the features of the first chunk of each row of audio in [-1, 1]; can be jitted.

        x = max(log10(mel power), maximum of the chunk - decades), rescaled by (x + 4) / 4.
        """
        audio = audio[:, : self.samples]
        audio = jnp.pad(audio, ((0, 0), (0, self.samples - audio.shape[1])))
        power = _power(audio, self.n_fft, self.hop)
        filters = mel_filters(self.mels, self.n_fft, self.sample_rate).astype(np.float32)
        mel = jnp.einsum("btf,fm->btm", power, filters, precision=jax.lax.Precision.HIGHEST)
        x = jnp.log10(jnp.maximum(mel, FLOOR))
        x = jnp.maximum(x, x.max(axis=(1, 2), keepdims=True) - self.decades)
        return (x + 4) / 4


def _power(audio: Float[Array, "B samples"], n_fft: int, hop: int) -> Float[Array, "B frames bins"]:
    """Return |DFT|^2 of Hann-windowed frames; frame i is centred at sample i * hop."""
    b, n = audio.shape
    count = n // hop  # Whisper drops the last of 1 + n // hop frames
    audio = jnp.pad(audio, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    # A frame is a concatenation of slices of `hop` samples, because a gather would be slow.
    slices = -(-n_fft // hop)
    size = (count + slices - 1) * hop
    audio = jnp.pad(audio, ((0, 0), (0, max(size - audio.shape[1], 0))))[:, :size].reshape(b, -1, hop)
    frames = jnp.concatenate([audio[:, i : i + count] for i in range(slices)], axis=-1)[..., :n_fft]
    window = np.sin(np.pi * np.arange(n_fft) / n_fft) ** 2
    dft = jnp.fft.rfft(frames * window[None, None].astype(np.float32))
    return dft.real**2 + dft.imag**2


def mel_filters(mels: int, n_fft: int, sample_rate: int) -> Float[np.ndarray, "bins mels"]:
    """Return triangular filters of area 1, evenly spaced in mels from 0 Hz to `TOP_HZ`.

    The scale and the areas are those of Slaney's Auditory Toolbox (1998), as in librosa.
    """
    bins = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    edges = _hertz(np.linspace(0, _TOP_MEL, mels + 2))
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (middle - low)
    falling = (high - bins[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# Slaney's mel scale: 200/3 Hz per mel up to 1000 Hz, then 27 mels per factor of 6.4.
_KNEE_MEL, _KNEE_HZ = 15.0, 1000.0
_TOP_MEL = _KNEE_MEL + 27 * np.log(TOP_HZ / _KNEE_HZ) / np.log(6.4)


def _hertz(mels: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.where(mels < _KNEE_MEL, mels * 200 / 3, _KNEE_HZ * 6.4 ** ((mels - _KNEE_MEL) / 27))
