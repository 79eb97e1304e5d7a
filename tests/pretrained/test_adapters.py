"""LoRA adapters are merged into the matrices of an exported checkpoint."""

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from attnlab.pretrained import import_export
from attnlab.train import LoRA
from attnlab.train.lora import add_adapters, merge_adapters
from tests.pretrained.hf_models import assert_close, batch
from tests.pretrained.test_decoders import decoder

pytestmark = pytest.mark.parity

RULE = r"attention/(query|out)/kernel$"
HF_NAMES = {"query": "self_attn.q_proj", "out": "self_attn.o_proj"}


def test_merged_export_equals_unmerged_adapters(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    imported = decoder("llama", tmp_path / "plain")
    config = LoRA(rank=2, alpha=6.0, rule=RULE)
    with jax.set_mesh(imported.mesh):
        params = flatten_dict(add_adapters(config, imported.params, jax.random.key(0)))
        for i, (path, x) in enumerate(params.items()):
            if path[-1] == "b":
                params[path] = 0.3 * jax.random.normal(jax.random.key(i), x.shape)
        merged = merge_adapters(config, unflatten_dict(params))
    ids, _ = batch(imported.hf_model.config.vocab_size, (9, 9))
    with jax.set_mesh(imported.mesh):
        logits = np.asarray(jax.jit(imported.model.apply)({"params": merged}, ids))

    exported = epath.Path(tmp_path) / "adapted"
    import_export.write_checkpoint(exported, imported.config, merged, epath.Path(imported.folder))
    loaded = AutoModelForCausalLM.from_pretrained(exported)

    for layer in range(imported.hf_model.config.num_hidden_layers):
        for name, hf_name in HF_NAMES.items():
            at = ("lora", "layers", "periods", "block0", "attention", name, "kernel")
            a, b = (torch.tensor(np.asarray(params[*at, end][layer])) for end in "ab")
            a, b = (a.flatten(0, -2), b.flatten(1))

            def add_adapter(_, inputs, output, a=a, b=b):
                return output + 3.0 * inputs[0] @ a @ b

            imported.hf_model.get_submodule(f"model.layers.{layer}.{hf_name}").register_forward_hook(
                add_adapter
            )
    with torch.no_grad():
        expected, merged_logits = (m(torch.tensor(ids)).logits.numpy() for m in (imported.hf_model, loaded))
    assert_close(logits, expected)
    assert_close(merged_logits, expected)
