"""Synthetic speech by espeak-ng, a formant synthesiser."""

import _ctypes
import ctypes
import threading
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import signal

from attnlab.errors import InputError

SAMPLE_RATE = 16_000
_RETRIEVE, _UTF8, _RATE, _PITCH = 2, 1, 1, 3  # constants of speak_lib.h
_LOCK = threading.Lock()  # the library synthesises one text at a time
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng.

    Attributes:
      name: a language and optionally a variant, "en-us+f2".
      words_per_minute: from 80 to 450.
      pitch: from 0 to 100.
    """

    name: str = "en"
    words_per_minute: int = 175
    pitch: int = 50

    def __post_init__(self):
        if not 80 <= self.words_per_minute <= 450 or not 0 <= self.pitch <= 100:
            raise ValueError("words_per_minute must be from 80 to 450, and pitch from 0 to 100")


def speak(text: str, voice: Voice = Voice()) -> Float[np.ndarray, " samples"]:
    """Return a text as audio in [-1, 1] with 16,000 samples per second, always the same samples.

    Raises:
      InputError: espeak-ng is not installed (extra `speech`), or has no such voice.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("speech needs espeak-ng: pip install 'attnlab[speech]'") from None
    with _LOCK:
        # Reloaded for each text, because the library keeps the phase of a voice's flutter.
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            sound, rate = _spoken(library, espeakng_loader.get_data_path(), text, voice)
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
    return signal.resample_poly(sound / np.float32(32768), SAMPLE_RATE, rate).astype(np.float32)


def _spoken(library: ctypes.CDLL, data: str, text: str, voice: Voice) -> tuple[np.ndarray, int]:
    """Return samples and the sampling rate."""
    rate = library.espeak_Initialize(_RETRIEVE, 0, data.encode(), 0)
    if rate <= 0:
        raise InputError(f"espeak-ng does not start: it finds no data in {data}")
    chunks = [np.zeros(0, np.int16)]

    @_CALLBACK
    def take(samples, count, events):
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    if library.espeak_SetVoiceByName(voice.name.encode()):
        raise InputError(f"espeak-ng has no voice {voice.name!r}")
    library.espeak_SetParameter(_RATE, voice.words_per_minute, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return np.concatenate(chunks), rate
