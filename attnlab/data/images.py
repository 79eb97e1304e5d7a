"""Image preprocessing of vision models: resize, crop, rescale, normalise."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from attnlab.data import preprocessor
from attnlab.errors import InputError

ImageLike: TypeAlias = Image.Image | UInt8[np.ndarray, "rows columns channels"]
Triple: TypeAlias = tuple[float, ...]


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
        usual, s = _PROCESSORS[name], {name: value for name, value in settings.items() if value is not None}
        does = {name: s.get(f"do_{name}", True) for name in ("resize", "rescale", "normalize")}
        size = _size(s["size"], usual.size) if "size" in s else usual.size
        cut = s.get("do_center_crop", usual.crop is not None)
        crop = _size(s["crop_size"], (1, 1)) if "crop_size" in s else usual.crop or (224, 224)
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
          InputError: the image is not 8-bit, or `mean` and `std` have another number of channels.
        """
        resized = image if isinstance(image, Image.Image) else _to_pil(image)
        resized = resized.convert("RGB") if self.rgb else resized
        if self.size is not None:
            rows, columns = _resized_shape(resized, self.size)
            resized = resized.resize((columns, rows), Image.Resampling[self.filter.upper()])
        pixels = np.atleast_3d(np.asarray(resized))
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
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
_KNOWN_SETTINGS = {
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
    *("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std"),
}


def _size(setting: Any, default: Any) -> tuple[int, int] | int:
    """Parse a size: an object, or a number, which is a square if the default is a pair."""
    if isinstance(setting, int):
        return (setting, setting) if isinstance(default, tuple) else setting
    if set(setting) == {"height", "width"}:
        return setting["height"], setting["width"]
    if set(setting) == {"shortest_edge"}:
        return setting["shortest_edge"]
    raise InputError(f"{preprocessor.CONFIG_FILE}: a size of {', '.join(setting)} is not supported")


def _sides(size: tuple[int, int] | None) -> dict[str, int] | None:
    return size and {"height": size[0], "width": size[1]}


def _filter(number: int) -> Any:
    try:
        return Image.Resampling(number).name.lower()
    except ValueError:
        raise InputError(f"{preprocessor.CONFIG_FILE}: resample={number} is not supported") from None


def _triple(numbers: float | list[float]) -> Triple:
    return tuple(map(float, numbers)) if isinstance(numbers, list | tuple) else (float(numbers),)


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
