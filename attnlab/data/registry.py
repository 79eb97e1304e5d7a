"""Text sets by their TensorFlow Datasets names, read without TensorFlow: `tfds:NAME[/CONFIG][#FEATURE]`."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from attnlab.errors import InputError

# Share of the training split that is held out where a set has neither validation nor test.
VALIDATION_SHARE = 20


class Column(Sequence[dict[str, str]]):
    """One text feature of a data source, from `start` to `stop`, as records."""

    def __init__(self, source: Sequence[Any], feature: str, start: int = 0, stop: int | None = None):
        self._source = source
        self._feature = feature
        self._range = range(len(source))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index):
        value = self._source[self._range[index]][self._feature]
        return {"text": value.decode() if isinstance(value, bytes) else str(value)}


def records(name: str, split: str) -> Column:
    """The records of a prepared set.

    Validation is its split of that name, else "test", else the last twentieth of "train".
    Raises `InputError` for a name that TFDS does not know, for a set that is not prepared here
    (with the command to do so), and for a set without a text feature or with a choice of them.
    """
    name, _, feature = name.partition("#")
    builder = _builder(name)
    feature = _text_feature(name, builder.info.features, feature)
    splits = list(builder.info.splits)
    if "train" not in splits:
        raise InputError(f"tfds:{name} has no split 'train', only {', '.join(splits)}")
    held_out = next((s for s in ("validation", "test") if s in splits), None)
    source = builder.as_data_source(split=held_out if split == "validation" and held_out else "train")
    if held_out:
        return Column(source, feature)
    border = len(source) - len(source) // VALIDATION_SHARE
    return Column(source, feature, 0, border) if split == "train" else Column(source, feature, border)


def _builder(name: str) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0], known, n=3)
        hint = f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
        raise InputError(f"tfds:{name} is neither registered with TFDS nor prepared here{hint}") from None
    except (ValueError, AssertionError) as error:
        raise InputError(f"tfds:{name}: {str(error).splitlines()[0]}") from None
    prepare = (
        f"""python -c "import tensorflow_datasets as t; """
        f"""t.builder('{name}', file_format='array_record').download_and_prepare()\""""
    )
    if not (Path(builder.data_dir) / "dataset_info.json").exists():
        raise InputError(f"tfds:{name} is not prepared in {builder.data_dir}; with a network: {prepare}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"tfds:{name} is prepared as {builder.info.file_format}, not array_record: {prepare}"
        )
    return builder


def _text_feature(name: str, features: Any, wanted: str) -> str:
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if wanted in texts:
        return wanted
    if wanted or not texts:
        there = f"its text features: {', '.join(texts)}" if texts else f"only {', '.join(features)}"
        raise InputError(f"tfds:{name} has no text feature {wanted!r}; {there}".replace(" ''", ""))
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    choices = ", ".join(f"tfds:{name}#{text}" for text in texts)
    raise InputError(f"tfds:{name} has several text features; name one: {choices}")
