"""BERT checkpoints: export from scratch, older tensor names, and unsupported settings."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from attnlab.models import ClassifierConfig, DenseConfig, FirstToken, MaskedLMConfig, PooledConfig
from attnlab.pretrained import import_export, load
from tests.models.test_encoder import ALBERT
from tests.models.test_encoder import BERT as CONFIG
from tests.pretrained.test_sentences import BERT

TANH = DenseConfig("tanh")
HEADS = {
    "BertModel": PooledConfig(FirstToken(), TANH),
    "BertForMaskedLM": MaskedLMConfig(DenseConfig("gelu", norm=True)),
    "BertForSequenceClassification": ClassifierConfig(5, FirstToken(), TANH),
    "BertForTokenClassification": ClassifierConfig(3, None, None),
}


@pytest.mark.parametrize("name", HEADS)
def test_config_fields_of_model_from_scratch(name):
    config = replace(CONFIG, vocab_size=13, head=HEADS[name], positions=replace(CONFIG.positions, offset=0))
    fields = import_export.hf_config_fields(config, 16)
    assert (fields["model_type"], fields["architectures"]) == ("bert", [name])


def test_unsupported_models_are_rejected_on_export(refuses):
    for config in (CONFIG, ALBERT, replace(CONFIG, head=MaskedLMConfig(None))):
        with refuses("no supported model type can express this model"):
            import_export.hf_config_fields(replace(config, vocab_size=13), 14)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a masked LM, and its parameters."""
    (tmp_path / "config.json").write_text(json.dumps(BERT | {"architectures": ["BertForMaskedLM"]}))
    folder = epath.Path(tmp_path)
    family, config = import_export.read_config(folder)
    rng, abstract = np.random.default_rng(0), import_export.abstract_params(config)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    import_export.write_params(folder, family, params)
    return tmp_path, params


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")


def test_older_names_and_ignored_tensors(checkpoint):
    """google-bert/bert-base-uncased has these names, buffers and heads."""
    folder, params = checkpoint
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(tensors):
        for new, old in older.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        extra = ("bert.embeddings.position_ids", "cls.seq_relationship.weight", "bert.pooler.dense.bias")
        return tensors | dict.fromkeys(extra, np.zeros(3, np.float32))

    rewrite(folder, change)
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).params, params)


def test_missing_and_unexpected_tensors_are_reported(checkpoint, refuses):
    folder, _ = checkpoint
    rewrite(folder, lambda t: t | {"adapter.weight": t.pop("cls.predictions.transform.dense.bias")})
    with refuses("missing: cls.predictions.transform.dense.bias", "unexpected: adapter.weight"):
        load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForPreTraining"]}, "architectures=['BertForPreTraining'] is not supported"),
        ({"problem_type": "regression"}, "problem_type='regression' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        (
            {"tie_word_embeddings": False},
            "missing: cls.predictions.decoder.weight",
        ),
    ],
)
def test_unsupported_settings_are_rejected(checkpoint, refuses, changes, message):
    folder, _ = checkpoint
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with refuses(message):
        load(str(folder))
