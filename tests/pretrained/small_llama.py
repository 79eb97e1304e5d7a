"""A small Llama checkpoint in Hugging Face's format, written without transformers."""

import json

import jax
import numpy as np

from attnlab.data import BPE
from attnlab.pretrained import import_export

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TEXTS = ["the cat sat on the mat because it was tired"] * 4


def write(folder, config=LLAMA, seed=0):
    """Write a checkpoint with random weights and a tokenizer; return the parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    family, model = import_export.read_config(folder)
    abstract = import_export.abstract_params(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.1, abstract)
    import_export.write_params(folder, family, params)
    BPE(vocab_size=290).train(TEXTS).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return params
