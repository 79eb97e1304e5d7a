"""Image preprocessing compared with the image processors of transformers."""

import json

import numpy as np
import pytest
from PIL import Image

from attnlab.data import preprocessor
from attnlab.data.images import ImageProcessor, as_8bit

RNG = np.random.default_rng(0)
SIDES = [(37, 61), (80, 45), (20, 20), (33, 32)]
SMALL = {"size": {"height": 24, "width": 17}}
SHORTEST = {"size": {"shortest_edge": 21}, "crop_size": {"height": 19, "width": 20}}
CASES = {
    "ViT": ("ViT", SMALL),
    "ViT, other filter and means": ("ViT", SMALL | {"resample": 1, "image_mean": [0.1, 0.2, 0.3]}),
    "SigLIP": ("Siglip", SMALL),
    "CLIP": ("CLIP", SHORTEST),
    "CLIP, crop larger than image": ("CLIP", SHORTEST | {"crop_size": {"height": 30, "width": 25}}),
    "CLIP, not resized or normalised": ("CLIP", SHORTEST | {"do_resize": False, "do_normalize": False}),
    "DINOv2": ("Bit", SHORTEST | {"do_rescale": False}),
    "DeiT": ("DeiT", SMALL | {"crop_size": {"height": 15, "width": 11}, "rescale_factor": 0.01}),
}


def smooth(rows, columns, channels=3):
    """Return noisy waves a few pixels long, for which resampling filters differ."""
    y, x = np.mgrid[:rows, :columns, :channels][:2]
    waves = 128 + 90 * np.sin(x / 3 + y / 5)
    return np.clip(waves + RNG.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_pixels_match_transformers(case, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, settings = CASES[case]
    hf_processor = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    hf_processor.save_pretrained(tmp_path)
    processor = ImageProcessor.from_settings(preprocessor.read(tmp_path))
    exported = processor.settings()
    assert ImageProcessor.from_settings(exported) == processor
    reimported = getattr(transformers, f"{exported['image_processor_type']}Pil")(**exported)
    for sides in SIDES:
        image = smooth(*sides)
        expected, same = (
            p(Image.fromarray(image), return_tensors="np").pixel_values[0] for p in (hf_processor, reimported)
        )
        np.testing.assert_array_equal(same, expected)
        got = processor(image)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected.transpose(1, 2, 0), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(processor(Image.fromarray(image)), got)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["ViT", "Siglip", "CLIP", "Bit", "DeiT"])
def test_default_settings_match_transformers(kind):
    transformers = pytest.importorskip("transformers")
    full = json.loads(getattr(transformers, f"{kind}ImageProcessorPil")().to_json_string())
    minimal = {"image_processor_type": f"{kind}ImageProcessor"}
    assert ImageProcessor.from_settings(minimal) == ImageProcessor.from_settings(full)


def test_older_settings_formats():
    """A numeric size is a square (ViT) or the shorter side (CLIP); the type may be missing."""
    vit = ImageProcessor.from_settings(
        {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 48}
    )
    assert vit.size == (48, 48) and vit.crop is None and vit.filter == "bilinear"
    clip = ImageProcessor.from_settings(
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 48}
    )
    assert clip.size == 48 and clip.crop == (48, 48) and clip.filter == "bicubic"


def test_grey_images_keep_or_repeat_channel():
    grey = smooth(9, 12, 1)
    pixels = ImageProcessor(rgb=False, size=None, mean=(0.5,), std=(0.25,))
    np.testing.assert_allclose(pixels(grey), (grey / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        ImageProcessor(size=None)(grey), ImageProcessor(size=None)(np.repeat(grey, 3, axis=-1))
    )


@pytest.mark.parametrize(("settings", "message"), [
    ({"image_processor_type": "Mask2FormerImageProcessor"}, "the images of Mask2Former are not supported"),
    ({"do_pad": True}, "has unsupported settings: do_pad"),
    ({"size": {"longest_edge": 5}}, "a size of longest_edge"),
    ({"resample": 9}, "resample=9"),
    ({"do_center_crop": True, "crop_size": {"shortest_edge": 5}}, "must have a height and a width"),
])  # fmt: skip
def test_unsupported_settings_are_rejected(refuses, settings, message):
    with refuses("preprocessor_config.json" if "Mask" not in message else "Mask", message):
        ImageProcessor.from_settings(settings)


def test_invalid_images_are_rejected(refuses):
    with refuses("(4, 5, 3) of float64"):
        ImageProcessor()(np.zeros((4, 5, 3)))
    with refuses("1 channels", "3 means"):
        ImageProcessor(rgb=False)(smooth(4, 5, 1))
    with pytest.raises(ValueError, match="std"):
        ImageProcessor(std=(0.0,))
    with pytest.raises(ValueError, match="size"):
        ImageProcessor(size=0)


@pytest.mark.parametrize("name, value", [
    *(("size", value) for value in (0, -1, "x", [1, 2], 10**6, 2.5, True, {"height": 10**6, "width": 10**6})),
    *(("size", {"height": value, "width": 2}) for value in (-1, "x", None)),
    *(("size", {"shortest_edge": value}) for value in (10**9, 0, [])), ("size", {"height": 5}), ("crop_size", {}),
    *(("image_std", value) for value in (0, [0, 0, 0], {}, "x", [], [1] * 99)),
    *(("image_mean", value) for value in ("x", [None, None, None], {"a": 1}, [1e30])),
    *(("rescale_factor", value) for value in ("x", 0, [1])), ("resample", "x"), ("do_resize", "yes"),
    ("image_processor_type", 5), ("image_processor_type", ["x"]),
])  # fmt: skip
def test_settings_of_wrong_type_or_size_are_refused(refuses, name, value):
    with refuses():
        ImageProcessor.from_settings({name: value})(smooth(5, 6, 3))


def test_huge_results_are_refused(refuses):
    strip = Image.new("RGB", (10_000, 1))
    with refuses("224 x 2240000 pixels; at most"):
        ImageProcessor(size=224)(strip)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_images_are_scaled_by_257(mode):
    values = np.array([[0, 128, 129, 256, 257, 40_000, 65_535]])
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    expected = np.rint(values / 65_535 * 255)
    np.testing.assert_array_equal(as_8bit(image, "RGB"), np.repeat(expected[..., None], 3, axis=-1))
    pixels = ImageProcessor(size=None, mean=(0.0,), std=(1.0,))(image)
    np.testing.assert_allclose(pixels[..., 0], expected / 255, rtol=1e-6)


def test_float_images_are_scaled_from_unit_or_byte_range(refuses):
    unit = np.array([[0.0, 0.5, 0.25, 1.0]], np.float32)
    np.testing.assert_array_equal(as_8bit(Image.fromarray(unit)), np.rint(unit * 255))
    byte = np.array([[0.0, 1.4, 1.6, 255.0]], np.float32)
    np.testing.assert_array_equal(as_8bit(Image.fromarray(byte)), [[0, 1, 2, 255]])
    for wrong in (np.nan, np.inf, -1.0, 256.0):
        with refuses("an image of mode F has values", "from 0 to 255"):
            as_8bit(Image.fromarray(np.array([[0.5, wrong]], np.float32)))
    with refuses("an image of mode I has values from -1 to 5"):
        as_8bit(Image.fromarray(np.array([[-1, 5]], np.int32)))
