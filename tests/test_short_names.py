"""Text names a config class without the suffix `Config`: `GatedMLP` means `GatedMLPConfig`."""

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
    """Yield the members of an annotation and those of the elements of its tuples."""
    for member in members(annotation):
        yield member
        for part in getattr(member, "__args__", ()) if is_tuple(member) else ():
            if part is not Ellipsis:
                yield from elements(part)


def fields():
    """Yield every field of every config reachable from `Experiment`, with its possible classes."""
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


def test_choices_of_a_field_have_distinct_short_names():
    unions = {where: classes for where, classes in fields() if len(classes) > 1}
    assert len(unions) > 20
    for where, classes in unions.items():
        names = [short_name(cls) for cls in classes]
        assert len(names) == len(set(names)), (where, names)


@pytest.mark.parametrize("text", ["GatedMLP(width=64)", "GatedMLPConfig(width=64)"])
def test_parse_accepts_both_spellings_and_render_writes_short_name(text):
    value = parse(text, MLPConfig | GatedMLPConfig | ExpertsConfig)
    assert value == GatedMLPConfig(width=64)
    assert render(value) == "GatedMLP(width=64)" and render(GatedMLPConfig) == "GatedMLP"


def test_errors_name_the_short_name():
    union = MLPConfig | GatedMLPConfig | ExpertsConfig
    with pytest.raises(InputError, match="expected MLP, GatedMLP or Experts; did you mean 'GatedMLP'"):
        parse("GatdMLP", union)
    with pytest.raises(InputError, match="^Experts has no field 'expert'"):
        parse("Experts(expert=3)", union)


@pytest.mark.parametrize("name", ["Decoder", "DecoderConfig"])
def test_model_configs_have_short_names(name):
    model = parse(f"{name}(depth=2, attention=Attention(4))", ModelConfig)
    assert model == DecoderConfig(depth=2, attention=AttentionConfig(4))
    assert render(model) == "Decoder(depth=2,attention=Attention(heads=4))"


def test_flattened_short_names_are_valid_overrides():
    experiment = configs.load(str(ROOT / "experiments" / "lm_docs.py")).config
    flat = configs.flatten(experiment)
    assert render(flat["model"]) == "Decoder" and render(flat["model.attention"]) == "Attention"
    again = configs.override_all(experiment, [("model.feed_forward", "GatedMLP(width=64)")])
    assert again.model.feed_forward == dataclasses.replace(experiment.model.feed_forward, width=64)


def test_saved_config_has_short_names_and_loads_both_spellings():
    saved = configs.to_dict(GatedMLPConfig(width=64))
    assert saved["$type"] == "attnlab.layers.position_wise:GatedMLP"
    assert configs.from_dict(saved) == GatedMLPConfig(width=64)
    assert configs.from_dict(saved | {"$type": f"{saved['$type']}Config"}) == GatedMLPConfig(width=64)


def test_names_that_differ_only_in_suffix():
    """Saved configs may contain both; a field that accepts both is an error."""
    for value in (Bare(3), BareConfig(3)):
        assert configs.from_dict(configs.to_dict(value)) == value
    with pytest.raises(InputError, match="Bare and BareConfig have the same short name Bare"):
        choices(Bare | BareConfig)
