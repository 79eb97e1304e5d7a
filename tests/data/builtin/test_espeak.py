import sys
from dataclasses import replace

import numpy as np
import pytest

from attnlab.data.builtin.espeak import SAMPLE_RATE, Voice, speak


@pytest.fixture
def synthesiser():
    pytest.importorskip("espeakng_loader")


def test_speak_returns_deterministic_waveform(synthesiser):
    audio = speak("seven hundred and forty two")
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert 1.0 < len(audio) / SAMPLE_RATE < 3.0 and 0.2 < np.abs(audio).max() <= 1.1
    np.testing.assert_array_equal(audio, speak("seven hundred and forty two"))


def test_words_and_voices_differ(synthesiser):
    voice = Voice()
    slow, fast = (speak("seven", replace(voice, words_per_minute=n)) for n in (120, 300))
    assert len(slow) > 1.3 * len(fast)
    recordings = [
        speak("seven"),
        speak("nine"),
        speak("seven", Voice("en+f3")),
        speak("seven", replace(voice, pitch=90)),
    ]
    for i, first in enumerate(recordings):
        for second in recordings[:i]:
            assert len(first) != len(second) or np.abs(first - second).max() > 0.05


def test_invalid_voices_are_rejected(synthesiser, refuses):
    with refuses("no voice 'klingon-x'"):
        speak("seven", Voice("klingon-x"))
    with pytest.raises(ValueError, match="80 to 450"):
        Voice(words_per_minute=20)


def test_missing_extra_error_has_install_command(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with refuses("pip install 'attnlab[speech]'"):
        speak("seven")
