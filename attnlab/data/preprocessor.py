"""A checkpoint's `preprocessor_config.json`: the numbers its pictures or sound are prepared by."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from attnlab.errors import InputError

CONFIG_FILE = "preprocessor_config.json"
# Newer, of models that read texts as well: the same settings are a part of it.
PROCESSOR_CONFIG_FILE = "processor_config.json"

# Who wrote the file, and how the library that wrote it hands arrays out: nothing of what is computed.
_NO_EFFECT = {
    "data_format",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "return_attention_mask",
    "return_tensors",
    "image_seq_length",
}


def read(path: epath.PathLike) -> dict[str, Any]:
    """The settings in a checkpoint's folder, local or gs://.

    Raises:
      InputError: no such file, or one that is not a JSON object.
    """
    files = [epath.Path(path) / name for name in (CONFIG_FILE, PROCESSOR_CONFIG_FILE)]
    file = next((file for file in files if file.exists()), files[0])
    try:
        settings = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {CONFIG_FILE} in {path}") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if isinstance(settings, dict) and file.name == PROCESSOR_CONFIG_FILE:
        settings = settings.get("image_processor") or settings.get("feature_extractor")
    if not isinstance(settings, dict):
        raise InputError(f"{file} must be a JSON object, with what reads images or sound")
    return settings


def processor_class(settings: Mapping[str, Any]) -> str | None:
    """The class that wrote the settings, "CLIP" of "CLIPImageProcessorFast"; None where they do not say."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name and name.removesuffix(ending)
    return name


def check_known(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Checks that nothing is asked for beyond what is known; what is null or false asks for nothing.

    Raises:
      InputError: naming the settings that are not known.
    """
    asked = {name for name, value in settings.items() if value is not None and value is not False}
    if unknown := sorted(asked - _NO_EFFECT - set(known)):
        raise InputError(f"{CONFIG_FILE} asks for what attnlab does not do: {', '.join(unknown)}")
