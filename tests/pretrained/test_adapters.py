"""A model with adapters is written as one of transformers whose matrices have them in it."""

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from attnlab.pretrained import import_export
from attnlab.train import LoRA
from attnlab.train.lora import add_adapters, merge_adapters
from tests.pretrained.hf_models import batch, close
from tests.pretrained.test_decoders import decoder

pytestmark = pytest.mark.parity

RULE = r"attention/(query|out)/kernel$"
THEIRS = {"query": "self_attn.q_proj", "out": "self_attn.o_proj"}


def test_written_it_computes_what_adapters_beside_the_matrices_do(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    peer = decoder("llama", tmp_path / "plain")
    config = LoRA(rank=2, alpha=6.0, rule=RULE)
    with jax.set_mesh(peer.mesh):
        params = flatten_dict(add_adapters(config, peer.params, jax.random.key(0)))
        for i, (path, x) in enumerate(params.items()):
            if path[-1] == "b":
                params[path] = 0.3 * jax.random.normal(jax.random.key(i), x.shape)
        merged = merge_adapters(config, unflatten_dict(params))
    ids, _ = batch(peer.hf_model.config.vocab_size, (9, 9))
    with jax.set_mesh(peer.mesh):
        ours = np.asarray(jax.jit(peer.model.apply)({"params": merged}, ids))

    written = epath.Path(tmp_path) / "adapted"
    import_export.write_checkpoint(written, peer.config, merged, epath.Path(peer.folder))
    loaded = AutoModelForCausalLM.from_pretrained(written)

    for layer in range(peer.hf_model.config.num_hidden_layers):
        for name, theirs in THEIRS.items():
            at = ("lora", "layers", "periods", "block0", "attention", name, "kernel")
            a, b = (torch.tensor(np.asarray(params[*at, end][layer])) for end in "ab")
            a, b = (a.flatten(0, -2), b.flatten(1))

            def add(_, given, out, a=a, b=b):
                return out + 3.0 * given[0] @ a @ b

            peer.hf_model.get_submodule(f"model.layers.{layer}.{theirs}").register_forward_hook(add)
    with torch.no_grad():
        adapted, alone = (m(torch.tensor(ids)).logits.numpy() for m in (peer.hf_model, loaded))
    close(ours, adapted)
    close(alone, adapted)
