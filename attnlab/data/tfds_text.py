"""Text sets of TensorFlow Datasets, read without TensorFlow: `tfds:NAME[/CONFIG][#FEATURE]`."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from attnlab.errors import InputError, one_line

SPLITS = ("train", "validation")

# Share of the training split that is held out if a set has neither validation nor test.
VALIDATION_SHARE = 20

# NAME, NAME/CONFIG and a version; the config may have the characters that TFDS's own configs have.
NAME = re.compile(r"[A-Za-z]\w*(/[\w.+=-]+)?(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?", re.ASCII)
INFO = "dataset_info.json"


class TextColumn(Sequence[dict[str, str]]):
    """One text feature of a data source from `start` to `stop`, as records."""

    def __init__(self, source: Sequence[Any], feature: str, start: int = 0, stop: int | None = None):
        self._source = source
        self._feature = feature
        self._range = range(len(source))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index):
        try:
            value = self._source[self._range[index]][self._feature]
        except (IndexError, TypeError):
            raise
        except Exception as error:  # of the reader, at damaged files
            raise InputError(
                f"record {index} of the prepared data cannot be read: {one_line(error)}"
            ) from error
        return {"text": value.decode() if isinstance(value, bytes) else str(value)}


def records(name: str, split: str) -> TextColumn:
    """Return the records of a prepared set.

    Validation is the split of that name, else "test", else the last twentieth of "train".

    Raises:
      InputError: TFDS does not know the name or config, the set is not prepared (the message has
        the command), it has no text feature, or it has several.
    """
    name, _, feature = name.partition("#")
    builder = _builder(name)
    feature = _text_feature(name, builder.info.features, feature)
    splits = list(builder.info.splits) or list(SPLITS)  # none are known before it is prepared
    if "train" not in splits:
        raise InputError(f"tfds:{name} has no split 'train', only {', '.join(splits)}")
    held_out = next((s for s in ("validation", "test") if s in splits), None)
    source = _source(name, builder, held_out if split == "validation" and held_out else "train")
    if held_out:
        return TextColumn(source, feature)
    border = len(source) - len(source) // VALIDATION_SHARE
    return TextColumn(source, feature, 0, border) if split == "train" else TextColumn(source, feature, border)


def files(name: str) -> Mapping[str, epath.Path]:
    """Return the prepared files of a set by name and version; none if the folder does not exist.

    The description of the set is left out: a new preparation of the same records changes it.

    Raises:
      InputError: as `records`.
    """
    builder = _builder(name.partition("#")[0])
    folder = epath.Path(builder.data_dir)
    inside = sorted(folder.iterdir()) if folder.exists() else []
    return {f"{builder.info.full_name}/{file.name}": file for file in inside if file.name != INFO}


def _builder(name: str) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition(":")[0].partition("/")
    if not NAME.fullmatch(name):
        raise InputError(f"tfds:{ascii(name)[1:-1]} is not a name of TFDS: NAME, NAME/CONFIG or NAME:1.0.0")
    try:
        builder = tfds.builder(name)
        builder.info.splits  # noqa: B018 - reads the prepared description
        return builder
    except tfds.core.DatasetNotFoundError:
        known = sorted(set(tfds.list_builders(with_community_datasets=False)))
        where = "neither registered with TFDS (without TensorFlow) nor prepared here"
        raise InputError(f"tfds:{base} is {where}{_close(base, known)}") from None
    except Exception as error:  # TFDS raises many types
        configs = _configs(base)
        if config and config not in configs:
            raise InputError(f"tfds:{base} has no config {config!r}{_close(config, configs)}") from None
        folder = tfds.core.constants.DATA_DIR
        raise InputError(
            f"tfds:{name} cannot be used: {one_line(error)}; its prepared files are below {folder}"
        ) from None


def _configs(base: str) -> list[str]:
    try:
        return list(tfds.builder_cls(base).builder_configs)
    except Exception:  # a set that is prepared, but not registered
        return []


def _close(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3) or (known if len(known) < 10 else [])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _source(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Sequence[Any]:
    try:
        return builder.as_data_source(split=split)
    except Exception as error:
        prepared = (epath.Path(builder.data_dir) / INFO).exists()
        if prepared and not isinstance(error, NotImplementedError):
            raise InputError(
                f"tfds:{name}: the files in {builder.data_dir} cannot be read: {one_line(error)}"
            ) from error
        wrong = "prepared in a format without random access" if prepared else "not prepared"
        raise InputError(
            f"tfds:{name} is {wrong} in {builder.data_dir}; where there is a network, run: "
            f"""python -c "import tensorflow_datasets as t; """
            f"""t.builder('{name}', file_format='array_record').download_and_prepare()\""""
        ) from None


def _text_feature(name: str, features: Any, wanted: str) -> str:
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if wanted in texts:
        return wanted
    if wanted or not texts:
        choices = f"its text features: {', '.join(texts)}" if texts else f"only {', '.join(features)}"
        raise InputError(f"tfds:{name} has no text feature {wanted!r}; {choices}".replace(" ''", ""))
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    choices = ", ".join(f"tfds:{name}#{text}" for text in texts)
    raise InputError(f"tfds:{name} has several text features; name one: {choices}")
