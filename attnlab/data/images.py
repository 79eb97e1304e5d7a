"""Image preprocessing of vision models: resize, crop, rescale, normalise."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from attnlab import untrusted
from attnlab.data import preprocessor
from attnlab.errors import InputError, check_fields, shorten

ImageLike: TypeAlias = Image.Image | UInt8[np.ndarray, "rows columns channels"]
Triple: TypeAlias = tuple[float, ...]

MAX_SIDE = 4096  # of a resized or cropped image


@dataclass(frozen=True)
class ImageProcessor:
    """The preprocessing of an image, applied in this order.

    Attributes:
      rgb: convert to RGB.
      size: rows and columns after resizing, or one number for the shorter side, which keeps the
        aspect ratio; None does not resize.
      filter: resampling filter of Pillow.
      crop: rows and columns of the center crop, padded with black; None does not crop.
      scale: factor of pixels, which are in [0, 255].
      mean: subtracted from each channel; one value, or one per channel.
      std: divisor of each channel; one value, or one per channel.
    """

    rgb: bool = True
    size: tuple[int, int] | int | None = (224, 224)
    filter: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name} must be at least 1, or none, not {value}")
        check_fields(self, "scale", above=0)
        if 0 in self.std:
            raise ValueError("std must not be 0")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ImageProcessor":
        """Return the preprocessing of a checkpoint from the settings of `preprocessor.read`.

        Raises:
          InputError: the image processor or a setting is not supported.
        """
        name = preprocessor.processor_class(settings) or "ViT"  # its first files have no class
        if name not in _PROCESSORS:
            raise InputError(f"the images of {name} are not supported; those of {', '.join(_PROCESSORS)} are")
        preprocessor.check_known(settings, _KNOWN_SETTINGS)
        usual, s = _PROCESSORS[name], preprocessor.check_types(settings, _KNOWN_SETTINGS)
        does = {name: s.get(f"do_{name}", True) for name in ("resize", "rescale", "normalize")}
        size = _size("size", s["size"], usual.size) if "size" in s else usual.size
        cut = s.get("do_center_crop", usual.crop is not None)
        crop = _size("crop_size", s["crop_size"], (1, 1)) if "crop_size" in s else usual.crop or (224, 224)
        if cut and not isinstance(crop, tuple):
            raise InputError(
                f"{preprocessor.CONFIG_FILE}: crop_size={s['crop_size']} must have a height and a width"
            )
        return cls(
            rgb=s.get("do_convert_rgb", usual.rgb),
            size=size if does["resize"] else None,
            filter=_filter(s["resample"]) if "resample" in s else usual.filter,
            crop=crop if cut and isinstance(crop, tuple) else None,
            scale=s.get("rescale_factor", 1 / 255) if does["rescale"] else 1.0,
            mean=_triple(s.get("image_mean", usual.mean)) if does["normalize"] else (0.0,),
            std=_triple(s.get("image_std", usual.std)) if does["normalize"] else (1.0,),
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes this object."""
        short = isinstance(self.size, int)
        normal = self.mean != (0.0,) or self.std != (1.0,)
        return {
            "image_processor_type": "CLIPImageProcessor" if short or self.crop else "ViTImageProcessor",
            "do_convert_rgb": self.rgb,
            "do_resize": self.size is not None,
            "size": {"shortest_edge": self.size} if isinstance(self.size, int) else _sides(self.size),
            "resample": int(Image.Resampling[self.filter.upper()]),
            "do_center_crop": self.crop is not None,
            "crop_size": _sides(self.crop),
            "do_rescale": self.scale != 1,
            "rescale_factor": self.scale,
            "do_normalize": normal,
            "image_mean": list(self.mean) if normal else None,
            "image_std": list(self.std) if normal else None,
        }

    def __call__(self, image: ImageLike) -> Float[np.ndarray, "rows columns channels"]:
        """Return the preprocessed pixels of an image, float32.

        Raises:
          InputError: `as_8bit` refuses the image, an array is not uint8, the result would have over
            `MAX_SIDE`^2 pixels, or `mean` and `std` have another number of channels.
        """
        resized = image if isinstance(image, Image.Image) else _to_pil(image)
        resized = as_8bit(resized, "RGB" if self.rgb else None)
        if self.size is not None:
            rows, columns = _resized_shape(resized, self.size)
            _check_pixels(rows, columns)
            resized = resized.resize((columns, rows), Image.Resampling[self.filter.upper()])
        pixels = np.atleast_3d(np.asarray(resized))
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        _check_pixels(*pixels.shape[:2])
        if not {1, pixels.shape[-1]} >= {len(self.mean), len(self.std)}:
            raise InputError(
                f"an image has {pixels.shape[-1]} channels, but the preprocessor has {len(self.mean)} means "
                f"and {len(self.std)} deviations"
            )
        scaled = (pixels * np.float64(self.scale)).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


# Defaults of the processors for settings that a file omits.
_SQUARE = ImageProcessor()
_CLIP = ImageProcessor(
    size=224,
    crop=(224, 224),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_PROCESSORS = {
    "ViT": replace(_SQUARE, rgb=False, filter="bilinear"),
    "DeiT": replace(_SQUARE, rgb=False, size=(256, 256), crop=(224, 224)),
    "Siglip": _SQUARE,
    "CLIP": _CLIP,
    "Bit": _CLIP,
}
_SIDE = untrusted.integer(1, MAX_SIDE)
_STD = untrusted.number(1e-6, 1e6)
_MEAN = untrusted.number(-1e6, 1e6)
_KNOWN_SETTINGS = {
    "do_resize": untrusted.BOOLEAN,
    "do_center_crop": untrusted.BOOLEAN,
    "do_rescale": untrusted.BOOLEAN,
    "do_normalize": untrusted.BOOLEAN,
    "do_convert_rgb": untrusted.BOOLEAN,
    "size": _SIDE | untrusted.OBJECT,
    "crop_size": _SIDE | untrusted.OBJECT,
    "resample": untrusted.integer(0, max(Image.Resampling)),
    "rescale_factor": untrusted.number(1e-9, 1e9),
    "image_mean": _MEAN | untrusted.list_of(_MEAN, 1, 4),
    "image_std": _STD | untrusted.list_of(_STD, 1, 4),
}


def _size(name: str, setting: Any, default: Any) -> tuple[int, int] | int:
    """Parse a size: an object, or a number, which is a square if the default is a pair."""
    if isinstance(setting, int):
        return (setting, setting) if isinstance(default, tuple) else setting
    sides = {
        side: untrusted.check(f"{preprocessor.CONFIG_FILE}: {name}.{side}", setting[side], _SIDE)
        for side in ("height", "width", "shortest_edge")
        if side in setting
    }
    if set(setting) == {"height", "width"}:
        return sides["height"], sides["width"]
    if set(setting) == {"shortest_edge"}:
        return sides["shortest_edge"]
    listing = shorten(", ".join(map(str, setting)))
    raise InputError(f"{preprocessor.CONFIG_FILE}: a {name} of {listing} is not supported")


def _filter(number: int) -> Any:
    return Image.Resampling(number).name.lower()


def _sides(size: tuple[int, int] | None) -> dict[str, int] | None:
    return size and {"height": size[0], "width": size[1]}


def _triple(numbers: float | list[float]) -> Triple:
    return tuple(map(float, numbers)) if isinstance(numbers, list | tuple) else (float(numbers),)


def as_8bit(image: Image.Image, mode: str | None = None) -> Image.Image:
    """Return an image of at most 8 bits per channel, converted to a mode of Pillow unless None.

    Grey values of 16 bits (modes "I;16" and "I") are divided by 257, so that 65535 becomes 255;
    Pillow's own conversion would clip them at 255. Floats (mode "F") are from 0 to 1 or, if one is
    larger, from 0 to 255. Transparency is dropped, as in transformers.

    Raises:
      InputError: a value is outside this range or not a number.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values, most = np.asarray(image), 255.0 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= most):
            raise InputError(
                f"an image of mode {image.mode} has values from {values.min()} to {values.max()}; "
                f"they must be from 0 to {most:g}"
            )
        if image.mode == "F":
            scaled = values * np.float32(1 if values.max() > 1 else 255)
            eight = np.rint(scaled, out=scaled)
        else:
            eight = (values.astype(np.uint32) + 128) // 257
        image = Image.fromarray(eight.astype(np.uint8))
    return image if mode is None else image.convert(mode)


def _check_pixels(rows: int, columns: int) -> None:
    if rows * columns > MAX_SIDE**2:
        raise InputError(
            f"a preprocessed image would have {rows} x {columns} pixels; at most {MAX_SIDE**2:,} are allowed"
        )


def _to_pil(image: np.ndarray) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3:
        actual = f"{image.shape} of {image.dtype}"
        raise InputError(f"an image must be (rows, columns, channels) of uint8, not {actual}")
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def _resized_shape(image: Image.Image, size: tuple[int, int] | int) -> tuple[int, int]:
    """Return rows and columns of the resized image."""
    if isinstance(size, tuple):
        return size
    columns, rows = image.size
    short = min(columns, rows)
    return int(size * rows / short), int(size * columns / short)


def _center_crop(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """Crop the center, padding with zeros; an odd remainder of padding goes above and left."""
    for axis, wanted in enumerate(crop):
        actual = pixels.shape[axis]
        if wanted <= actual:
            pixels = np.take(pixels, np.arange(wanted) + (actual - wanted) // 2, axis)
        else:
            before = -((actual - wanted) // 2)
            room = [(0, 0)] * axis + [(before, wanted - actual - before)] + [(0, 0)] * (2 - axis)
            pixels = np.pad(pixels, room)
    return pixels
