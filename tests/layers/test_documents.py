"""Document ids, lengths and rows without padding: three forms of the same mask in every model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.layers import AttentionConfig
from attnlab.layers.attention import documents
from attnlab.models import (
    DecoderConfig,
    EncoderConfig,
    RecurrentConfig,
    RecurrentSeq2SeqConfig,
    Seq2SeqConfig,
    SpeechEncoderConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from tests.jitted import Jitted

RNG = np.random.default_rng(0)
B, T = 3, 8
TOKENS = jnp.asarray(RNG.integers(1, 30, (B, T)), jnp.int32)
LENGTHS = jnp.array([8, 5, 1])
IDS = (jnp.arange(T)[None] < LENGTHS[:, None]).astype(jnp.int32)
SMALL = {"depth": 1, "width": 16, "attention": AttentionConfig(2)}
VIT = ViTConfig(**SMALL, image=(8, 8, 3), patch=(4, 4), classes=0, registers=1)
IMAGES = jnp.asarray(RNG.normal(size=(B, 8, 8, 3)), jnp.float32)
MODELS = {
    "decoder": (DecoderConfig(**SMALL), None),
    "encoder": (EncoderConfig(**SMALL), None),
    "recurrent": (RecurrentConfig(depth=1, width=16), None),
    "text to text": (Seq2SeqConfig(EncoderConfig(**SMALL), DecoderConfig(**SMALL)), TOKENS),
    "recurrent text to text": (RecurrentSeq2SeqConfig(depth=1, width=16), TOKENS),
    "speech": (
        Seq2SeqConfig(SpeechEncoderConfig(**SMALL, mels=4, frames=8), DecoderConfig(**SMALL)),
        jnp.asarray(RNG.normal(size=(B, 8, 4)), jnp.float32),
    ),
    "images before a text": (VisionLanguageConfig(encoder=VIT, decoder=DecoderConfig(**SMALL)), IMAGES),
}


@pytest.mark.parametrize("name", MODELS)
def test_lengths_and_ids_give_equal_logits(name):
    config, source = MODELS[name]
    model = Jitted(config.build(30))
    named = {} if source is None else {"source": source}
    padding = {} if source is None else {"source_segments": IDS}
    params = model.init(jax.random.key(0), TOKENS, IDS, **named, **padding)

    def logits(segment_ids, source_segments):
        extra = {} if source is None else {"source_segments": source_segments}
        return model.apply(params, TOKENS, segment_ids, **named, **extra)

    def compare(actual, expected, valid):
        np.testing.assert_allclose(actual[valid], expected[valid], rtol=2e-5, atol=2e-5)

    compare(logits(LENGTHS, LENGTHS), logits(IDS, IDS), IDS > 0)
    compare(logits(None, None), logits(jnp.ones_like(IDS), jnp.ones_like(IDS)), IDS >= 0)


def test_unpadded_images_have_no_mask():
    model = VIT.build(0)
    encode = jax.jit(lambda x, n: model.init_with_output(jax.random.key(0), x, n, method="encode")[0])
    whole, padded = encode(IMAGES, None), encode(IMAGES, jnp.array([8, 8, 3]))
    assert whole.documents.whole and whole.documents.mask(whole.documents) is None
    np.testing.assert_array_equal(padded.documents.lengths, [6, 6, 4])  # two tokens, two patches a row
    np.testing.assert_array_equal(padded.segments, np.arange(6) < np.array([[6], [6], [4]]))


lengths = st.lists(st.integers(0, 6), min_size=2, max_size=2)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_masks_of_all_forms_allow_pairs_of_one_document(data):
    """Also after the functions that models apply to documents."""

    def draw(size):
        form = data.draw(st.sampled_from(["whole", "lengths", "ids"]))
        ids = {
            "whole": None,
            "lengths": jnp.array(data.draw(lengths)),
            "ids": jnp.array(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=size, max_size=size), min_size=2, max_size=2))),
        }[form]  # fmt: skip
        return documents(ids, jnp.zeros((2, size)))

    queries, keys = draw(4).followed_by(draw(2)), draw(6).every(2).repeated(2).after(1)
    assert np.asarray(queries.ids).shape == (2, 6)
    for q, k in ((queries, keys), (keys, keys)):
        mask = q.mask(k)
        size = q.ids.shape[1], k.ids.shape[1]
        allowed = np.ones((2, *size), bool) if mask is None else np.asarray(mask.materialize(*size, 2))[:, 0]
        expected = np.asarray(q.ids)[:, :, None] == np.asarray(k.ids)[:, None]
        expected &= (np.asarray(k.ids) > 0)[:, None]
        valid = np.asarray(q.ids) > 0
        np.testing.assert_array_equal(allowed[valid], expected[valid])
