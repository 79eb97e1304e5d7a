"""The `preprocessor_config.json` of a checkpoint: settings that prepare images or audio."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from attnlab.errors import InputError

CONFIG_FILE = "preprocessor_config.json"
# The newer file of multimodal models, which contains the same settings.
PROCESSOR_CONFIG_FILE = "processor_config.json"

# Settings that do not change computed values: the class that wrote the file, and array types.
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
    """Return the settings in the folder of a checkpoint, local or gs://.

    Raises:
      InputError: there is no such file, or it is not a JSON object.
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
        raise InputError(f"{file} must be a JSON object with settings for images or audio")
    return settings


def processor_class(settings: Mapping[str, Any]) -> str | None:
    """Return the processor class without suffix ("CLIP" for "CLIPImageProcessorFast"), or None."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name and name.removesuffix(ending)
    return name


def check_known(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that all settings are known, except those that are null or false.

    Raises:
      InputError: names the unknown settings.
    """
    asked = {name for name, value in settings.items() if value is not None and value is not False}
    if unknown := sorted(asked - _NO_EFFECT - set(known)):
        raise InputError(f"{CONFIG_FILE} has unsupported settings: {', '.join(unknown)}")
