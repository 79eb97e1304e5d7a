import sys
from dataclasses import replace

import numpy as np
import pytest

from attnlab.data.builtin.espeak import SAMPLE_RATE, Voice, speak


@pytest.fixture
def synthesiser():
    pytest.importorskip("espeakng_loader")


def test_it_speaks(synthesiser):
    sound = speak("seven hundred and forty two")
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert 1.0 < len(sound) / SAMPLE_RATE < 3.0 and 0.2 < np.abs(sound).max() <= 1.1
    np.testing.assert_array_equal(sound, speak("seven hundred and forty two"))


def test_words_and_voices_are_told_apart(synthesiser):
    voice = Voice()
    slow, fast = (speak("seven", replace(voice, words_per_minute=n)) for n in (120, 300))
    assert len(slow) > 1.3 * len(fast)
    heard = [
        speak("seven"),
        speak("nine"),
        speak("seven", Voice("en+f3")),
        speak("seven", replace(voice, pitch=90)),
    ]
    for i, one in enumerate(heard):
        for other in heard[:i]:
            assert len(one) != len(other) or np.abs(one - other).max() > 0.05


def test_what_cannot_be_says_why(synthesiser, refuses):
    with refuses("no voice 'klingon-x'"):
        speak("seven", Voice("klingon-x"))
    with pytest.raises(ValueError, match="80 to 450"):
        Voice(words_per_minute=20)


def test_without_the_extra_it_says_what_to_install(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with refuses("pip install 'attnlab[speech]'"):
        speak("seven")
