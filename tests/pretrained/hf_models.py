"""transformers models with random weights, imported, and helpers to compare outputs."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from attnlab import sharding
from attnlab.pretrained import import_export, tensor_mapping, tensors

LENGTHS = (11, 7)  # number of tokens in each row of a batch


def random_weights(model):
    """Draw weights large enough for uneven attention; scales of norms stay near one."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            mean = p if p.ndim == 1 and "bias" not in name else 0.0
            p.copy_(mean + noise * (0.3 if p.ndim == 1 else 0.15))
    return model.eval()


@dataclass(frozen=True)
class Imported:
    """A saved transformers model and the same model imported."""

    hf_model: object
    folder: Path

    @cached_property
    def mesh(self):
        return sharding.make_mesh(sharding.parse_mesh("single", 1))

    @cached_property
    def _family_and_config(self):
        return import_export.read_config(self.folder)

    @property
    def family(self):
        return self._family_and_config[0]

    @property
    def config(self):
        return self._family_and_config[1]

    @cached_property
    def model(self):
        return self.config.build(1)

    @cached_property
    def abstract(self):
        return import_export.abstract_params(self.config, self.mesh)

    @cached_property
    def params(self):
        return import_export.read_params(self.folder, self.family, self.abstract)

    def named(self, tree):
        """Return parameters, or their gradients, with the names and layouts of the checkpoint."""
        return dict(tensors.to_tensors(tensor_mapping.tensor_slices(self.family.tensors, self.params), tree))


def save_and_import(model, folder):
    """Set random weights, save the model and return it with its import."""
    random_weights(model).save_pretrained(folder)
    return Imported(model, folder)


def assert_export_roundtrip(imported, folder):
    """Assert that transformers loads the exported parameters with the same bits."""
    import_export.write_params(folder, imported.family, imported.params)
    imported.hf_model.config.save_pretrained(folder)
    reloaded = type(imported.hf_model).from_pretrained(folder)
    for name, tensor in imported.hf_model.state_dict().items():
        np.testing.assert_array_equal(reloaded.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def batch(vocab, lengths=LENGTHS, seed=1, left=False):
    """Return token ids (B, T) and their mask (B, T), padded on the right or the left."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (len(lengths), max(lengths)))
    valid = np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]
    if left:
        valid = valid[:, ::-1]
    return np.where(valid, ids, 0), valid.astype(np.int32).copy()


def saved_gradients(model, folder):
    """Return a model's gradients with the names and layouts of its safetensors file."""
    values = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.new_zeros(p.shape) if p.grad is None else p.grad  # frozen parameters have none
    model.save_pretrained(folder)
    for name, p in model.named_parameters():
        p.data = values[name]
    return load_file(folder / "model.safetensors")


def positions_of(valid):
    """Return the position of each token among the valid tokens of its row."""
    return np.maximum(np.cumsum(valid, axis=1) - 1, 0)


def assert_close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def compiled_apply(imported, **options):
    """Return the jitted model as a function of tokens (B, T) and their mask (B, T)."""
    run = jax.jit(partial(imported.model.apply, **options))

    def apply(ids, valid):
        with jax.set_mesh(imported.mesh):
            outputs = run({"params": imported.params}, *map(jnp.asarray, (ids, valid, positions_of(valid))))
        return jax.tree.map(np.asarray, outputs)

    return apply
