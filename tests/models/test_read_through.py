"""A decoder reads through: one file from config to logits, and few files in one forward pass."""

import inspect
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import attnlab
from attnlab.attention.backends.registry import BACKENDS
from attnlab.layers import AttentionConfig
from attnlab.models import DecoderConfig, decoder

ROOT = Path(attnlab.__file__).parent


def test_one_forward_pass_enters_few_files():
    model = DecoderConfig(depth=2, width=32, attention=AttentionConfig(heads=4)).build(32)
    tokens = jnp.zeros((2, 16), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    all_backends, entered = list(BACKENDS), set()
    BACKENDS[:] = [b for b in BACKENDS if b.name == "blockwise"]  # enter no refused backend

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            entered.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(profile)
    try:
        model.apply(params, tokens)
    finally:
        sys.setprofile(None)
        BACKENDS[:] = all_backends
    assert len(entered) <= 21, sorted(entered)


def test_one_file_shows_a_decoder_from_config_to_logits():
    for name in ("DecoderConfig", "Decoder", "TextModel", "Block", "SelfAttention"):
        assert inspect.getsourcefile(getattr(decoder, name)) == decoder.__file__
    assert len(Path(decoder.__file__).read_text().splitlines()) <= 450
