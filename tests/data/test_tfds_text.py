import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from attnlab.data import Bytes, Text
from attnlab.errors import InputError

RECORDS = 40


def text(name):
    return Text(name=f"tfds:{name}", tokenizer=Bytes(), sequence_length=64, batch_size=2)


@pytest.mark.parametrize(
    "name",
    ["lm1b", "imdb_reviews", "imdb_reviews/plain_text", "ted_hrlr_translate/pt_to_en#en", "billsum#summary"],
)
def test_registered_datasets_are_read(name):
    with tfds.testing.mock_data(num_examples=RECORDS):
        data = text(name)
        assert len(data.records("train")) == RECORDS
        tokenizer = data.build_tokenizer()
        batch = next(data.train_iterator(tokenizer, seed=0))
        assert set(tokenizer.decode(batch.targets[0])) <= set(" abcdefghij")
        total = sum(b.num_bytes.sum() for b in data.eval_batches("validation", tokenizer))
        assert total == sum(len(record["text"]) for record in data.records("validation"))


@pytest.fixture
def with_splits(tmp_path):
    """Return a function that mocks lm1b prepared with the given splits."""

    def prepare(*splits, file_format="array_record"):
        info = tfds.builder("lm1b", data_dir=tmp_path).info
        template = tfds.core.ShardedFileTemplate(
            data_dir=Path(info.data_dir), dataset_name="lm1b", filetype_suffix=file_format
        )
        info.set_file_format(file_format, override=True)
        info.set_splits(
            tfds.core.SplitDict(
                tfds.core.SplitInfo(
                    name=s, shard_lengths=[RECORDS], num_bytes=999, filename_template=template
                )
                for s in splits
            )
        )
        Path(info.data_dir).mkdir(parents=True)
        info.write_to_directory(info.data_dir)
        return tfds.testing.mock_data(num_examples=RECORDS, data_dir=str(tmp_path))

    return prepare


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        (("train", "validation", "test"), (RECORDS, RECORDS)),
        (("train", "test"), (RECORDS, RECORDS)),
        (("train",), (38, 2)),
    ],
)
def test_validation_split_fallbacks(with_splits, splits, sizes):
    with with_splits(*splits):
        train, validation = (text("lm1b").records(split) for split in ("train", "validation"))
        assert (len(train), len(validation)) == sizes
        if len(splits) == 1:
            whole = [record["text"] for record in [*train, *validation]]
            source = tfds.builder("lm1b").as_data_source(split="train")
            assert whole == [source[i]["text"] for i in range(RECORDS)]


def test_missing_train_split_is_reported(with_splits):
    with with_splits("test"), pytest.raises(InputError, match="no split 'train', only test"):
        text("lm1b").records("train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm2b", "did you mean lm1b"),
        ("no_such_thing_at_all", "neither registered"),
        ("imdb_reviews/subwords", "no config 'subwords'; did you mean plain_text"),
        (
            "lm1b",
            r"not prepared in .*t\.builder\('lm1b', file_format='array_record'\)\.download_and_prepare",
        ),
        ("lm1b#title", "no text feature 'title'; its text features: text"),
        ("ag_news_subset", "name one: tfds:ag_news_subset#title, tfds:ag_news_subset#description"),
        ("ted_hrlr_translate/pt_to_en", "name one: .*#pt"),
        ("mnist", "no text feature; only image, label"),
        *(
            (name, "is not a name of TFDS")
            for name in (
                *("x'y", "..", "../x", "/etc", "#x", ";", "a;b", "a/b/c/d", "a/b/c", "gs://x", ":9.9.9"),
                *("huggingface:x/y", "åñ", "lm1b:", "lm1b:x", "lm1b/", "a b", "a\nb", "caf\udce9", "\0"),
                *("__import__('os').system('true')", "lm1b:1.2", "lm1b/x y"),
            )
        ),
        ("lm1b:9.9.9", "cannot be used: .*9.9.9"),
        ("lm2b:1.0.0", "did you mean lm1b"),
        ("imdb_reviews/subwords:1.0.0", "no config 'subwords'"),
    ],
)
def test_unusable_datasets_are_reported(name, message):
    with pytest.raises(InputError, match=message) as caught:
        text(name).records("train")
    assert "\n" not in str(caught.value)


def test_format_without_random_access_is_rejected(tmp_path, monkeypatch, with_splits):
    with_splits("train", file_format="tfrecord")
    monkeypatch.setattr(
        "tensorflow_datasets.builder", lambda name, b=tfds.builder: b(name, data_dir=tmp_path)
    )
    with pytest.raises(InputError, match="format without random access"):
        text("lm1b").records("train")


@pytest.mark.parametrize("length", [0, 100])
def test_damaged_description_is_reported(tmp_path, monkeypatch, with_splits, length):
    with_splits("train")
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_bytes(info.read_bytes()[:length])
    monkeypatch.setattr(
        "tensorflow_datasets.builder", lambda name, b=tfds.builder: b(name, data_dir=tmp_path)
    )
    with pytest.raises(InputError, match="tfds:lm1b cannot be used: ") as caught:
        text("lm1b").records("train")
    assert "\n" not in str(caught.value)


def test_prepared_files_are_fingerprinted(tmp_path, monkeypatch, with_splits):
    with_splits("train")
    monkeypatch.setattr(
        "tensorflow_datasets.builder", lambda name, b=tfds.builder: b(name, data_dir=tmp_path)
    )
    assert list(text("lm1b#text").files()) == ["lm1b/1.1.0/features.json"]  # without dataset_info.json


def test_tensorflow_is_not_imported():
    program = (
        "import sys, tensorflow_datasets as tfds; from attnlab.data import Text\n"
        "with tfds.testing.mock_data(num_examples=3): print(len(Text(name='tfds:lm1b').records('train')))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
