"""The `preprocessor_config.json` of a checkpoint: settings that prepare images or audio."""

from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from attnlab import untrusted
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
    if not file.exists():
        raise InputError(f"there is no {CONFIG_FILE} in {path}")
    settings: Any = untrusted.read_object(file)
    if file.name == PROCESSOR_CONFIG_FILE:
        settings = settings.get("image_processor") or settings.get("feature_extractor")
    if not isinstance(settings, dict):
        raise InputError(f"{file} must be a JSON object with settings for images or audio")
    return settings


def processor_class(settings: Mapping[str, Any]) -> str | None:
    """Return the processor class without suffix ("CLIP" for "CLIPImageProcessorFast"), or None.

    Raises:
      InputError: the class is not a string.
    """
    names = ("image_processor_type", "feature_extractor_type")
    classes = check_types(settings, dict.fromkeys(names, untrusted.string()))
    name = classes.get(names[0]) or classes.get(names[1])
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name and name.removesuffix(ending)
    return name


def check_types(settings: Mapping[str, Any], expected: Mapping[str, untrusted.Expected]) -> dict[str, Any]:
    """Return the settings that are not null and have an entry in `expected`, after checking them.

    Raises:
      InputError: a setting has another type or is out of range.
    """
    given = {name: settings[name] for name in expected if settings.get(name) is not None}
    return {
        name: untrusted.check(f"{CONFIG_FILE}: {name}", value, expected[name])
        for name, value in given.items()
    }


def check_known(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that all settings are known, except those that are null or false.

    Raises:
      InputError: names the unknown settings.
    """
    asked = {name for name, value in settings.items() if value is not None and value is not False}
    if unknown := sorted(asked - _NO_EFFECT - set(known)):
        raise InputError(f"{CONFIG_FILE} has unsupported settings: {', '.join(unknown)}")
