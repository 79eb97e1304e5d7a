"""A checkpoint of the Hugging Face layout as a model here, and a model here as such a checkpoint."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from attnlab import sharding
from attnlab.config.types import did_you_mean
from attnlab.errors import InputError
from attnlab.models import DecoderConfig
from attnlab.pretrained import files, table, tensors
from attnlab.pretrained.families import FAMILIES, Family
from attnlab.pretrained.settings import Settings


def read_config(folder: epath.Path) -> tuple[Family, DecoderConfig]:
    """The family and the config of the model in a folder.

    Raises:
      InputError: a model_type or a setting that there is nothing here for.
    """
    fields = files.read_json(folder / files.CONFIG)
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        known = f"{did_you_mean(str(kind), FAMILIES)} There are {', '.join(sorted(FAMILIES))}"
        raise InputError(f"{folder / files.CONFIG}: no model_type {kind!r}{known}")
    settings = Settings(fields, str(folder / files.CONFIG))
    try:
        return FAMILIES[kind], FAMILIES[kind].config(settings)
    except InputError:
        raise
    except ValueError as error:  # of a config's own checks
        raise InputError(f"{folder / files.CONFIG}: {error}") from error


def read_params(folder: epath.Path, family: Family, abstract: Any) -> Any:
    """The parameters in a folder, each made where it is to lie.

    Args:
      folder: of the checkpoint.
      family: whose table of names to use.
      abstract: shapes, dtypes and shardings of the model's parameters.

    Raises:
      InputError: files that cannot be read, or tensors that do not fit the config: all of them, by name.
    """
    with files.Checkpoint(folder) as checkpoint:
        there = checkpoint.shapes()
        bare = not any(name.startswith(family.prefix) for name in there)
        rows = [_without(row, family.prefix) for row in family.tensors] if bare else family.tensors
        found = table.places(rows, abstract)
        table.check(found, there, family.ignored, str(folder))
        return tensors.load(checkpoint, found, abstract)


def _without(row: table.Tensor, prefix: str) -> table.Tensor:
    return dataclasses.replace(row, theirs=row.theirs.removeprefix(prefix))


def write_params(folder: epath.Path, family: Family, params: Any) -> None:
    """Writes parameters under the names and in the layouts of a family."""
    files.write(folder, tensors.save(table.places(family.tensors, params), params))


def abstract_params(model: nn.Module, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a model's parameters on a mesh."""
    with jax.set_mesh(mesh):
        tokens = jnp.zeros((mesh.size, 1), jnp.int32, out_sharding=sharding.out_sharding("batch", None))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, x.sharding.spec)),
        shapes,
    )
