"""Numbers in the fields of every config class of the library."""

import dataclasses
import importlib
import pkgutil
import types
import typing

import pytest

import attnlab
from attnlab import layers, train
from attnlab.data.images import ImageProcessor
from attnlab.errors import InputError
from attnlab.models.contrastive import EndOfText

# Fields for which a number below 0 has a meaning.
SIGNED = {"bias", "forget_bias", "init_logit_scale", "init_logit_bias"}
# Fields that are compared with the tokenizer's vocabulary when the model is built, and limits of
# a run, which are flags.
CHECKED_LATER = {"vocab_size", "classes", "max_steps", "max_time"}


def config_classes():
    """Return the frozen dataclasses of the library whose fields all have defaults."""
    for part in ("data", "layers", "models", "train"):
        package = importlib.import_module(f"{attnlab.__name__}.{part}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(found.name)).values():
                is_config = isinstance(kind, type) and dataclasses.is_dataclass(kind)
                if is_config and kind.__module__ == found.name and kind.__dataclass_params__.frozen:
                    fields = [f for f in dataclasses.fields(kind) if f.init]
                    missing = dataclasses.MISSING
                    if all(f.default is not missing or f.default_factory is not missing for f in fields):
                        yield kind


def number_fields(kind):
    """Return the names and types of the fields that may hold a number."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if {int, float} & set(union) and field.init and not {bool} & set(union):
            yield field.name, int if int in union else float


CASES = [
    (kind, name, number)
    for kind in config_classes()
    for name, number in number_fields(kind)
    if name not in SIGNED | CHECKED_LATER and kind.__name__ != "AttentionArgs"
]


def test_many_fields_are_tried():
    assert len(CASES) > 80


@pytest.mark.parametrize(("kind", "name", "number"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_negative_number_is_refused(kind, name, number):
    try:
        config = kind()
    except (ValueError, TypeError):
        pytest.skip("abstract, or its defaults need another field")
    with pytest.raises((ValueError, InputError), match=name):
        dataclasses.replace(config, **{name: number(-1)})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (train.AdamW, "b1", 1.0),
        (train.AdamW, "b2", 2.0),
        (train.AdamW, "epsilon", float("nan")),
        (train.Lion, "b1", 2.0),
        (train.SGD, "momentum", 1.0),
        (train.Adafactor, "momentum", 2.0),
        (train.Adafactor, "decay_rate", 0.0),
        (train.Muon, "momentum", 1.5),
        (train.ScheduleFree, "interpolation", 1.0),
        (train.WarmupStableDecay, "decay", 2.0),
        (train.LoRA, "alpha", 0.0),
        (layers.Causal, "scale", 0.0),
        (layers.Sliding, "scale", -1.0),
        (layers.MuP, "base_head_dim", 0),
        (EndOfText, "token", -1),
        (ImageProcessor, "scale", 0.0),
    ],
)
def test_a_number_outside_its_interval_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})


def test_the_message_has_the_allowed_interval():
    with pytest.raises(ValueError, match=r"^b1=2.0 must be at least 0 and under 1$"):
        train.AdamW(b1=2.0)
    with pytest.raises(ValueError, match=r"^clip_norm=0.0 must be over 0, or none$"):
        train.AdamW(clip_norm=0.0)
