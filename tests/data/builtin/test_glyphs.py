from collections import Counter

import numpy as np
import pytest

from attnlab.data.builtin import glyphs
from attnlab.data.builtin.glyphs import HELD_OUT_STYLE, SIZE, STYLES, Glyphs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Glyphs of two of the twelve styles, prepared in a temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNLAB_DATA_DIR", str(tmp_path_factory.mktemp("glyphs")))
        patch.setattr(glyphs, "STYLES", ["DejaVuSansMono-Oblique", HELD_OUT_STYLE])
        yield Glyphs(batch_size=16)


def test_fonts_exist_and_names_fit():
    assert len(STYLES) == len(set(STYLES)) == 12
    names = {name for style in STYLES for name in glyphs.characters(style).values()}
    assert len(names) > 6000 and "smiling cat face with open mouth" in names
    assert max(len(name.split()) for name in names) == glyphs.LONGEST


def test_validation_names_use_training_words(data):
    train, validation = data.records("train"), data.records("validation")
    assert {record["style"] for record in train} == {b"DejaVuSansMono-Oblique"}
    assert {record["style"] for record in validation} == {HELD_OUT_STYLE.encode()}
    seen, unseen = ({data.text(record) for record in split} for split in (train, validation))
    assert not seen & unseen and len(seen) > 2000 and len(unseen) > 100
    all_names = {name for style in STYLES for name in glyphs.characters(style).values()}
    words = Counter(word for name in all_names - glyphs.held_out(all_names) for word in set(name.split()))
    assert min(words[word] for name in unseen for word in name.split()) >= glyphs.KNOWN


def test_images_show_their_characters(data):
    images = {}
    for record in data.records("train"):
        if record["character"] in (b"o", b"O", "ȯ".encode()):
            tokenizer = Glyphs(tokenizer=glyphs.Bytes()).build_tokenizer()
            example = data.encode(record, tokenizer)
            assert tokenizer.decode(example.targets) == data.text(record)
            assert example.source.shape == data.source_shape and example.source.dtype == np.float32
            images[record["character"].decode()] = example.source[..., 0]
    small, capital, dotted = (images[c] for c in "oOȯ")
    assert all(p.min() == 0 and 0.9 < p.max() <= 1 for p in images.values())
    height = {c: np.ptp(np.nonzero(p)[0]) for c, p in images.items()}
    assert height["O"] > height["o"] and height["ȯ"] > height["o"]
    np.testing.assert_array_equal(dotted[14:], small[14:])  # the letters differ only in the dot above
    assert dotted[:10].any() and not small[:10].any() and not (capital == small).all()


def test_batches_have_shapes_and_eos(data):
    tokenizer = data.build_tokenizer()
    batch = next(data.train_iterator(tokenizer, seed=0))
    assert batch.source.shape == (16, SIZE, SIZE, 1) and batch.tokens.shape == (16, 12)
    assert (batch.tokens[:, 0] == tokenizer.eos_id).all()
    lengths = batch.segments.sum(1)
    assert (batch.targets[np.arange(16), lengths - 1] == tokenizer.eos_id).all()
