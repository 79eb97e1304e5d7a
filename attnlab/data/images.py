"""Images as the numbers that vision towers read: resized, cut, scaled and normalised."""

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
    """What is done to an image, in this order.

    Attributes:
      rgb: whether it is first made one of three colours.
      size: rows and columns that it is resized to, or one number: the pixels of its shorter side, the other
        keeping its proportion; None leaves it as it is.
      filter: that it is resized by, averaging over what a smaller image leaves out; Pillow's.
      crop: rows and columns that are cut out of its middle, black where it has none; None is all of it.
      scale: factor of pixels, which are from 0 to 255.
      mean: taken from each channel after that; one for all, or one each.
      std: that each channel is then divided by.
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
        """The numbers of a checkpoint, from what `preprocessor.read` gives.

        Raises:
          InputError: settings of another image processor than those here, or that are not done here.
        """
        name = preprocessor.processor_class(settings) or "ViT"  # whose first files did not say
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
        """What `from_settings` makes these numbers of, for others to do the same."""
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
        """The numbers of an image.

        Raises:
          InputError: no 8-bit image, or one with other channels than it is to be normalised by.
        """
        picture = image if isinstance(image, Image.Image) else _to_pil(image)
        picture = picture.convert("RGB") if self.rgb else picture
        if self.size is not None:
            rows, columns = _resized_shape(picture, self.size)
            picture = picture.resize((columns, rows), Image.Resampling[self.filter.upper()])
        pixels = np.atleast_3d(np.asarray(picture))
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        if not {1, pixels.shape[-1]} >= {len(self.mean), len(self.std)}:
            raise InputError(
                f"an image of {pixels.shape[-1]} channels, to be normalised by {len(self.mean)} means and "
                f"{len(self.std)} deviations"
            )
        scaled = (pixels * np.float64(self.scale)).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


# What the processors do that files say nothing of.
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


def _size(said: Any, usual: Any) -> tuple[int, int] | int:
    """A size as files say it: by name, or one number, which is of a square where the usual size is one."""
    if isinstance(said, int):
        return (said, said) if isinstance(usual, tuple) else said
    if set(said) == {"height", "width"}:
        return said["height"], said["width"]
    if set(said) == {"shortest_edge"}:
        return said["shortest_edge"]
    raise InputError(f"{preprocessor.CONFIG_FILE}: a size of {', '.join(said)} is not supported")


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


def _resized_shape(picture: Image.Image, size: tuple[int, int] | int) -> tuple[int, int]:
    """Rows and columns of a picture that is resized."""
    if isinstance(size, tuple):
        return size
    columns, rows = picture.size
    short = min(columns, rows)
    return int(size * rows / short), int(size * columns / short)


def _center_crop(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """The middle of an image, with zeros around it if that is larger; what is odd is more above and left."""
    for axis, wanted in enumerate(crop):
        actual = pixels.shape[axis]
        if wanted <= actual:
            pixels = np.take(pixels, np.arange(wanted) + (actual - wanted) // 2, axis)
        else:
            before = -((actual - wanted) // 2)
            room = [(0, 0)] * axis + [(before, wanted - actual - before)] + [(0, 0)] * (2 - axis)
            pixels = np.pad(pixels, room)
    return pixels
