"""Import and export of checkpoints in Hugging Face's format.

`load` returns a model, its parameters and its tokenizer. `run.py --mode=import` and `--mode=export`
do the same for runs.
"""

from typing import Any, NamedTuple

import flax.linen as nn
from jax.sharding import Mesh

from attnlab.data import Tokenizer
from attnlab.layers import Dtypes
from attnlab.models import ModelConfig
from attnlab.pretrained import import_export
from attnlab.pretrained.repository import resolve


class Pretrained(NamedTuple):
    """A loaded checkpoint.

    Attributes:
      model: the Flax module.
      params: the parameters of `model`.
      tokenizer: the tokenizer, or None if the checkpoint has none.
    """

    model: nn.Module
    params: Any
    tokenizer: Tokenizer | None

    @property
    def config(self) -> ModelConfig:
        """The config of the model."""
        return self.model.config


def load(
    name: str,
    mesh: Mesh | None = None,
    dtypes: Dtypes = Dtypes(),  # noqa: B008 - frozen
    unrolled: bool = False,
) -> Pretrained:
    """Load a checkpoint, one tensor at a time, directly onto its devices.

    Args:
      name: a folder, or a Hugging Face hub id.
      mesh: shards the parameters over this mesh; use the model under `jax.set_mesh(mesh)`. None
        puts all parameters on one device.
      dtypes: dtypes of parameters, computation and logits.
      unrolled: store the parameters of each layer separately instead of stacked, which makes
        generation on a CPU faster; see `TransformerConfig.unrolled`.

    Raises:
      InputError: the checkpoint does not exist, its model type or a config field is not supported,
        it has no safetensors, or its tensors do not match the config (all are listed).
    """
    folder = resolve(name)
    family, config = import_export.read_config(folder)
    config = config.with_dtypes(dtypes)
    config = config.with_unrolled_layers() if unrolled else config
    params = import_export.read_params(folder, family, import_export.abstract_params(config, mesh))
    return Pretrained(config.build(1), params, import_export.read_tokenizer(folder))


__all__ = ["Pretrained", "load"]
