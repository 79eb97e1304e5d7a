"""Tests of attnlab/models/config.py: one signature of all models."""

import inspect

import pytest

from attnlab import models
from attnlab.models.config import Model

SIGNATURE = ("tokens", "segment_ids", "positions", "source", "source_segments", "cache", "deterministic")
MODELS = [m for m in vars(models).values() if isinstance(m, type) and issubclass(m, Model) and m is not Model]
ENCODERS = [m for m in MODELS if "encode" in vars(m)]


def parameters(function):
    _, *rest = inspect.signature(function).parameters.values()
    return [p for p in rest if p.kind != p.VAR_KEYWORD]


@pytest.mark.parametrize(
    "model", [m for m in MODELS if m is not models.SpeechEncoder], ids=lambda m: m.__name__
)
def test_models_share_one_signature(model):
    given = parameters(model.hidden)
    shared = [p for p in given if p.name in SIGNATURE]
    assert [p.name for p in shared] == [name for name in SIGNATURE if name in {p.name for p in shared}]
    assert [p.name for p in given if p.kind is not p.KEYWORD_ONLY] == list(SIGNATURE[:3])
    assert next(p for p in given if p.name == "deterministic").default is True
    assert all(p.default is None for p in given if p.name not in SIGNATURE)
    assert (model.__call__, model.loss_terms) == (Model.__call__, Model.loss_terms)


@pytest.mark.parametrize("model", ENCODERS, ids=lambda m: m.__name__)
def test_encoders_share_one_signature(model):
    given = parameters(model.encode)
    assert [p.name for p in given[:3]] == ["source", "source_segments", "deterministic"]
    assert [p.kind is p.KEYWORD_ONLY for p in given] == [False, False, *[True] * (len(given) - 2)]
    assert (given[1].default, given[2].default) == (None, True)


def test_there_are_models_of_every_family():
    assert len(MODELS) == 10 and len(ENCODERS) == 7
