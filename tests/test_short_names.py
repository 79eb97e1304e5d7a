"""Configs in text are named without a trailing `Config`: `GatedMLP` is a `GatedMLPConfig`."""

import dataclasses
from dataclasses import dataclass

import pytest

from attnlab import config as configs
from attnlab.config.text import parse, render
from attnlab.config.types import choices, fields_of, is_tuple, members, short_name
from attnlab.errors import InputError
from attnlab.layers import AttentionConfig, ExpertsConfig, GatedMLPConfig, MLPConfig
from attnlab.models import DecoderConfig, ModelConfig
from attnlab.train import Experiment
from tests.programs import ROOT


@dataclass(frozen=True)
class Bare:
    size: int = 1


@dataclass(frozen=True)
class BareConfig:
    size: int = 2


def elements(annotation):
    """The annotation's members, and those of the elements of its tuples."""
    for member in members(annotation):
        yield member
        for part in getattr(member, "__args__", ()) if is_tuple(member) else ():
            if part is not Ellipsis:
                yield from elements(part)


def fields():
    """Every field of every config that an experiment can hold, and the classes that it can be."""
    pending, seen = [Experiment], set()
    while pending:
        cls = pending.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for name, annotation in fields_of(cls).items():
            classes = {c for part in elements(annotation) for c in choices(part).values()}
            yield f"{cls.__name__}.{name}", {c for c in classes if c.__module__.startswith("attnlab.")}
            pending += classes


def test_no_two_choices_of_a_field_have_one_name():
    unions = {where: classes for where, classes in fields() if len(classes) > 1}
    assert len(unions) > 20
    for where, classes in unions.items():
        names = [short_name(cls) for cls in classes]
        assert len(names) == len(set(names)), (where, names)


@pytest.mark.parametrize("text", ["GatedMLP(width=64)", "GatedMLPConfig(width=64)"])
def test_both_spellings_are_read_and_the_short_one_is_written(text):
    value = parse(text, MLPConfig | GatedMLPConfig | ExpertsConfig)
    assert value == GatedMLPConfig(width=64)
    assert render(value) == "GatedMLP(width=64)" and render(GatedMLPConfig) == "GatedMLP"


def test_errors_say_the_short_name():
    union = MLPConfig | GatedMLPConfig | ExpertsConfig
    with pytest.raises(InputError, match="expected MLP, GatedMLP or Experts; did you mean 'GatedMLP'"):
        parse("GatdMLP", union)
    with pytest.raises(InputError, match="^Experts has no field 'expert'"):
        parse("Experts(expert=3)", union)


@pytest.mark.parametrize("name", ["Decoder", "DecoderConfig"])
def test_models_too(name):
    model = parse(f"{name}(depth=2, attention=Attention(4))", ModelConfig)
    assert model == DecoderConfig(depth=2, attention=AttentionConfig(4))
    assert render(model) == "Decoder(depth=2,attention=Attention(heads=4))"


def test_a_listing_has_short_names_that_can_be_given_again():
    experiment = configs.load(str(ROOT / "experiments" / "lm_docs.py")).config
    flat = configs.flatten(experiment)
    assert render(flat["model"]) == "Decoder" and render(flat["model.attention"]) == "Attention"
    again = configs.override_all(experiment, [("model.feed_forward", "GatedMLP(width=64)")])
    assert again.model.feed_forward == dataclasses.replace(experiment.model.feed_forward, width=64)


def test_a_saved_config_has_short_names_of_which_both_spellings_are_read():
    saved = configs.to_dict(GatedMLPConfig(width=64))
    assert saved["$type"] == "attnlab.layers.feed_forward:GatedMLP"
    assert configs.from_dict(saved) == GatedMLPConfig(width=64)
    assert configs.from_dict(saved | {"$type": f"{saved['$type']}Config"}) == GatedMLPConfig(width=64)


def test_two_names_that_differ_in_the_suffix_alone():
    """In a file both can be told; in one field of a config they are refused."""
    for value in (Bare(3), BareConfig(3)):
        assert configs.from_dict(configs.to_dict(value)) == value
    with pytest.raises(InputError, match="Bare and BareConfig have the same short name Bare"):
        choices(Bare | BareConfig)
