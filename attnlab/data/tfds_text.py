"""Text sets of TensorFlow Datasets, read without TensorFlow: `tfds:NAME[/CONFIG][#FEATURE]`."""

import difflib
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from attnlab.errors import InputError

SPLITS = ("train", "validation")

# Share of the training split that is held out if a set has neither validation nor test.
VALIDATION_SHARE = 20


class TextColumn(Sequence[dict[str, str]]):
    """One text feature of a data source from `start` to `stop`, as records."""

    def __init__(self, source: Sequence[Any], feature: str, start: int = 0, stop: int | None = None):
        self._source = source
        self._feature = feature
        self._range = range(len(source))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index):
        value = self._source[self._range[index]][self._feature]
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


def _builder(name: str) -> tfds.core.DatasetBuilder:
    base, _, config = name.partition("/")
    try:
        return tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = sorted(set(tfds.list_builders(with_community_datasets=False)))
        where = "neither registered with TFDS (without TensorFlow) nor prepared here"
        raise InputError(f"tfds:{base} is {where}{_close(base, known)}") from None
    except ValueError:
        configs = list(tfds.builder_cls(base).builder_configs)
        raise InputError(f"tfds:{base} has no config {config!r}{_close(config, configs)}") from None


def _close(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3) or (known if len(known) < 10 else [])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _source(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Sequence[Any]:
    try:
        return builder.as_data_source(split=split)
    except Exception as error:
        prepared = (epath.Path(builder.data_dir) / "dataset_info.json").exists()
        if prepared and not isinstance(error, NotImplementedError):
            raise
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
