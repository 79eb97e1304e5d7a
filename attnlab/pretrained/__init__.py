"""Checkpoints that people have, in and out: Hugging Face's layout of a folder.

`load` gives a model, its parameters and its tokenizer; `run.py --mode=import` and `--mode=export` are the
same for runs.
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
    """A checkpoint in hand.

    Attributes:
      model: the module.
      params: its parameters.
      tokenizer: None where the checkpoint has none.
    """

    model: nn.Module
    params: Any
    tokenizer: Tokenizer | None

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config


def load(
    name: str,
    mesh: Mesh | None = None,
    dtypes: Dtypes = Dtypes(),  # noqa: B008 - frozen
    unrolled: bool = False,
) -> Pretrained:
    """A checkpoint's model, read tensor by tensor straight to where it is to lie.

    Args:
      name: a folder, or an id of the Hugging Face hub.
      mesh: where to put the parameters, to be used under `jax.set_mesh`; None is one device, and no mesh.
      dtypes: number formats of parameters, computation and logits.
      unrolled: keep each layer's parameters by themselves, to generate faster on a CPU; see
        `ModelConfig.unrolled`.

    Raises:
      InputError: no such checkpoint, a model or a setting that there is nothing here for, no safetensors, or
        tensors that do not fit the config, all by name.
    """
    folder = resolve(name)
    family, config = import_export.read_config(folder)
    config = config.with_dtypes(dtypes)
    config = config.unrolled() if unrolled else config
    params = import_export.read_params(folder, family, import_export.abstract_params(config, mesh))
    return Pretrained(config.build(1), params, import_export.read_tokenizer(folder))


__all__ = ["Pretrained", "load"]
