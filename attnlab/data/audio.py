"""Sound as the log-mel spectrogram that Whisper reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.data import preprocessor
from attnlab.errors import InputError

TOP_HZ = 8000.0  # where the highest filter ends, at any sample rate
FLOOR = 1e-10  # power that silence counts as

# Setting -> field; the others are known when they have the one value that is done.
_FIELDS = {
    "feature_size": "mels",
    "sampling_rate": "sample_rate",
    "hop_length": "hop",
    "chunk_length": "chunk_seconds",
    "n_fft": "n_fft",
}
_ONLY = {"dither": 0.0, "padding_value": 0.0, "padding_side": "right", "do_normalize": False}
_DERIVED = {"mel_filters", "n_samples", "nb_max_frames"}  # older files repeat what follows from the others


@dataclass(frozen=True)
class LogMel:
    """The log-mel spectrogram of sound (Whisper, arXiv 2212.04356, section 2.2).

    Attributes:
      mels: number of mel filters; 80, or 128 from large-v3 on.
      sample_rate: samples a second.
      n_fft: samples in a frame, all of which the window weighs.
      hop: samples from one frame to the next.
      chunk_seconds: length that sound is cut or filled with silence to.
      decades: powers of ten that are kept below the loudest of the chunk.
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
        """The numbers of a checkpoint, from what `preprocessor.read` gives.

        Raises:
          InputError: settings of another feature extractor than Whisper's, or that are not done here.
        """
        kind = preprocessor.processor_class(settings)
        if kind not in (None, "Whisper"):
            raise InputError(f"the sound features of {kind} are not supported, only those of Whisper")
        preprocessor.check_known(settings, {*_FIELDS, *_ONLY, *_DERIVED})
        for name, value in _ONLY.items():
            if settings.get(name) not in (None, value):
                raise InputError(
                    f"{preprocessor.CONFIG_FILE} has {name}={settings[name]}; only {value} is supported"
                )
        return cls(**{field: settings[name] for name, field in _FIELDS.items() if name in settings})

    def settings(self) -> dict[str, Any]:
        """What `from_settings` makes these numbers of, for others to do the same."""
        named = {name: getattr(self, field) for name, field in _FIELDS.items()}
        return {"feature_extractor_type": "WhisperFeatureExtractor", **named, **_ONLY}

    @property
    def samples(self) -> int:
        """Samples in a chunk."""
        return self.chunk_seconds * self.sample_rate

    @property
    def frames(self) -> int:
        """Frames in a chunk, the length of the result."""
        return self.samples // self.hop

    def __call__(self, sound: Float[Array, "B samples"]) -> Float[Array, "B frames mels"]:
        """Features of the first chunk of each sound, which lies in -1 to 1; can be compiled.

        max(log10(mel power), greatest of the chunk - decades), moved to about -1 to 1 by (x + 4) / 4.
        """
        sound = sound[:, : self.samples]
        sound = jnp.pad(sound, ((0, 0), (0, self.samples - sound.shape[1])))
        power = _power(sound, self.n_fft, self.hop)
        filters = mel_filters(self.mels, self.n_fft, self.sample_rate).astype(np.float32)
        mel = jnp.einsum("btf,fm->btm", power, filters, precision=jax.lax.Precision.HIGHEST)
        x = jnp.log10(jnp.maximum(mel, FLOOR))
        x = jnp.maximum(x, x.max(axis=(1, 2), keepdims=True) - self.decades)
        return (x + 4) / 4


def _power(sound: Float[Array, "B samples"], n_fft: int, hop: int) -> Float[Array, "B frames bins"]:
    """|DFT|^2 of frames weighed by a periodic Hann window; frame i is centred at sample i * hop."""
    b, n = sound.shape
    count = n // hop  # of 1 + n // hop frames Whisper leaves out the last
    sound = jnp.pad(sound, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    # A frame is a few stretches of `hop` samples side by side: slices, where a gather would be slow.
    stretches = -(-n_fft // hop)
    size = (count + stretches - 1) * hop
    sound = jnp.pad(sound, ((0, 0), (0, max(size - sound.shape[1], 0))))[:, :size].reshape(b, -1, hop)
    frames = jnp.concatenate([sound[:, i : i + count] for i in range(stretches)], axis=-1)[..., :n_fft]
    window = np.sin(np.pi * np.arange(n_fft) / n_fft) ** 2
    dft = jnp.fft.rfft(frames * window[None, None].astype(np.float32))
    return dft.real**2 + dft.imag**2


def mel_filters(mels: int, n_fft: int, sample_rate: int) -> Float[np.ndarray, "bins mels"]:
    """Triangles of area 1 over frequency, evenly spaced in mels from 0 Hz to `TOP_HZ`.

    The scale and the areas are those of Slaney's Auditory Toolbox (1998), as in librosa.
    """
    bins = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    edges = _hertz(np.linspace(0, _TOP_MEL, mels + 2))
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (middle - low)
    falling = (high - bins[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# Slaney's mel scale: 200/3 Hz each up to 1000 Hz, and from there 27 mels for a factor of 6.4.
_KNEE_MEL, _KNEE_HZ = 15.0, 1000.0
_TOP_MEL = _KNEE_MEL + 27 * np.log(TOP_HZ / _KNEE_HZ) / np.log(6.4)


def _hertz(mels: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.where(mels < _KNEE_MEL, mels * 200 / 3, _KNEE_HZ * 6.4 ** ((mels - _KNEE_MEL) / 27))
