"""Models of transformers with random weights, saved, and what they compute, as NumPy arrays."""

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

LENGTHS = (11, 7)  # tokens in the rows of a batch, padded on the right


def random_weights(model):
    """Weights so large that attention is far from even, norms' scales around one included."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            near = p if p.ndim == 1 and "bias" not in name else 0.0
            p.copy_(near + noise * (0.3 if p.ndim == 1 else 0.15))
    return model.eval()


@dataclass(frozen=True)
class Imported:
    """A saved model of transformers, and the same read here."""

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
        """Our parameters, or gradients of them, under their names and in their layouts."""
        return dict(tensors.to_tensors(tensor_mapping.tensor_slices(self.family.tensors, self.params), tree))


def saved(model, folder):
    """`Imported` of a model of transformers with random weights."""
    random_weights(model).save_pretrained(folder)
    return Imported(model, folder)


def assert_written_again(peer, folder):
    """Holds that what is written again loads in transformers with the same bits."""
    import_export.write_params(folder, peer.family, peer.params)
    peer.hf_model.config.save_pretrained(folder)
    again = type(peer.hf_model).from_pretrained(folder)
    for name, tensor in peer.hf_model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def batch(vocab, lengths=LENGTHS, seed=1, left=False):
    """Token ids (B, T) and which of them are there, padded on the right or the left."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (len(lengths), max(lengths)))
    there = np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]
    if left:
        there = there[:, ::-1]
    return np.where(there, ids, 0), there.astype(np.int32).copy()


def saved_gradients(model, folder):
    """A model's gradients under the names, and in the layouts, that its parameters have in a file."""
    values = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.new_zeros(p.shape) if p.grad is None else p.grad  # none of what is frozen
    model.save_pretrained(folder)
    for name, p in model.named_parameters():
        p.data = values[name]
    return load_file(folder / "model.safetensors")


def positions_of(there):
    """The position of each token among those of its row."""
    return np.maximum(np.cumsum(there, axis=1) - 1, 0)


def close(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def program(peer, **options):
    """The model applied to tokens (B, T) and which of them are there, compiled once for all of a shape."""
    run = jax.jit(partial(peer.model.apply, **options))

    def apply(ids, there):
        with jax.set_mesh(peer.mesh):
            found = run({"params": peer.params}, *map(jnp.asarray, (ids, there, positions_of(there))))
        return jax.tree.map(np.asarray, found)

    return apply


def applied(peer, ids, there, **options):
    return program(peer, **options)(ids, there)
