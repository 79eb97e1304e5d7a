"""Checkpoints that store a copy of a tied table: equal, different, or without the original."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from attnlab.pretrained import import_export, load
from tests.pretrained.hf_models import Imported, assert_close, batch, random_weights
from tests.pretrained.small_llama import LLAMA, write
from tests.pretrained.test_seq2seq import BART, T5

OUTPUT, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def change(folder, function):
    """Replace the tensors of a folder by those that the function returns."""
    tensors = load_file(folder / "model.safetensors")
    save_file(function(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path):
    folder = epath.Path(tmp_path) / "llama"
    write(folder, LLAMA | {"tie_word_embeddings": True})
    return folder


def test_equal_copy_stays_tied(llama):
    change(llama, lambda tensors: tensors | {OUTPUT: tensors[TABLE].copy()})
    assert load(str(llama)).config.tied


def test_different_output_table_is_kept_and_exported(llama, tmp_path):
    change(llama, lambda tensors: tensors | {OUTPUT: 2 * tensors[TABLE]})
    model, params, _ = load(str(llama))
    table = params["embedding"]["table"]
    np.testing.assert_array_equal(params["readout"]["table"], 2 * np.asarray(table))
    # A run keeps only the files without tensors; its config knows that the table is separate.
    kept, exported = (epath.Path(tmp_path) / name for name in ("kept", "exported"))
    import_export.copy_non_tensor_files(llama, kept)
    import_export.write_checkpoint(exported, model.config, params, kept)
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(exported / "model.safetensors")[OUTPUT], 2 * np.asarray(table))


def test_copy_replaces_a_missing_table(llama):
    expected = load(str(llama)).params["embedding"]["table"]
    change(llama, lambda tensors: {OUTPUT if name == TABLE else name: x for name, x in tensors.items()})
    model, params, _ = load(str(llama))
    assert model.config.tied
    np.testing.assert_array_equal(params["embedding"]["table"], expected)


ENCODER = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 40, "max_position_embeddings": 32}
CASES = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32}, "lm_head.weight"),
    "bert": ("BertForMaskedLM", ENCODER, "cls.predictions.decoder.weight"),
    "roberta": ("RobertaForMaskedLM", ENCODER | {"pad_token_id": 0}, "lm_head.decoder.weight"),
    "albert": ("AlbertForMaskedLM", ENCODER | {"embedding_size": 16}, "predictions.decoder.weight"),
    "electra": ("ElectraForMaskedLM", ENCODER | {"embedding_size": 16}, "generator_lm_head.weight"),
    "t5": ("T5ForConditionalGeneration", T5 | {"num_layers": 1}, "lm_head.weight"),
    "bart": ("BartForConditionalGeneration", BART, "lm_head.weight"),
}  # fmt: skip


def hf_checkpoint(case, folder):
    """Save a model whose file has a different output table, and return its class."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    del torch
    name, settings, output = CASES[case]
    kind = getattr(transformers, name)
    model = random_weights(kind(kind.config_class(**settings)))
    model.save_pretrained(folder)
    shape = dict(model.named_parameters(remove_duplicate=False))[output].shape
    table = np.random.default_rng(3).normal(size=shape).astype(np.float32) * 0.2
    change(folder, lambda tensors: tensors | {output: table})
    return kind


def hf_logits(kind, folder):
    import torch

    ids, valid = batch(61)
    options = {"attention_mask": torch.tensor(valid)}
    if kind.__name__.endswith("ConditionalGeneration"):
        options["decoder_input_ids"] = torch.tensor(ids)
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(torch.tensor(ids), **options).logits.numpy()


def logits(folder):
    ids, valid = batch(61)
    model, params, _ = load(str(folder))
    ids, valid = (jnp.asarray(x, jnp.int32) for x in (ids, valid))
    inputs = {"tokens": ids, "segment_ids": valid}
    if hasattr(model.config, "encoder"):
        inputs = {"tokens": ids, "source": ids, "source_segments": valid}
    return np.asarray(model.apply({"params": params}, **inputs))


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_different_output_table_is_kept_as_in_transformers(case, tmp_path):
    folder, exported = tmp_path / "checkpoint", epath.Path(tmp_path) / "exported"
    kind = hf_checkpoint(case, folder)
    real = batch(61)[1].astype(bool)
    expected = hf_logits(kind, folder)
    assert_close(logits(folder)[real], expected[real])
    imported = Imported(None, epath.Path(folder))
    import_export.write_checkpoint(exported, imported.config, imported.params, imported.folder)
    np.testing.assert_array_equal(hf_logits(kind, exported)[real], expected[real])


@pytest.mark.parity
@pytest.mark.parametrize(("case", "shared"), [("t5", "shared.weight"), ("bart", "model.shared.weight")])
def test_other_copies_must_be_equal(case, shared, tmp_path, refuses):
    name = shared.replace("shared", "encoder.embed_tokens")
    hf_checkpoint(case, tmp_path)
    before = load(str(tmp_path)).params["decoder"]["embedding"]["table"]
    change(tmp_path, lambda tensors: {name if n == shared else n: x for n, x in tensors.items()})
    after = load(str(tmp_path)).params["decoder"]["embedding"]["table"]
    np.testing.assert_array_equal(after, before)
    change(tmp_path, lambda tensors: tensors | {shared: 2 * tensors[name]})
    with refuses(f"{name} differs from {shared}, although the model uses one for both"):
        load(str(tmp_path))
