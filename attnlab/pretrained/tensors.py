"""Tensors of a checkpoint as parameters on a mesh, and back, one at a time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from attnlab.pretrained.repository import Checkpoint
from attnlab.pretrained.table import Place, shapes_of
from attnlab.train.optimizers import parameter_name


def load(checkpoint: Checkpoint, found: Iterable[Place], abstract: Any) -> Any:
    """Parameters made where they are to lie, each shard from the tensors that it needs.

    On the host there is never more than a tensor and a shard.

    Args:
      checkpoint: whose tensors have been checked.
      found: the places of the parameters; one that has none is zeros.
      abstract: shapes, dtypes and shardings of the parameters.
    """
    places = defaultdict(list)
    for place in found:
        places[place.ours].append(place)

    def make(path, x: jax.ShapeDtypeStruct) -> jax.Array:
        pieces = places[parameter_name(path)]
        return jax.make_array_from_callback(
            x.shape, x.sharding, lambda at: _shard(checkpoint, pieces, x, at or ())
        )

    return jax.tree_util.tree_map_with_path(make, abstract)


def _shard(checkpoint: Checkpoint, pieces: list[Place], x, at: tuple[slice, ...] | None) -> np.ndarray:
    """The part of a parameter that one device holds."""
    at = tuple(slice(*s.indices(size)) for s, size in zip(at or (), x.shape, strict=True))
    shard = np.zeros([s.stop - s.start for s in at], x.dtype)
    for place in pieces:
        leading = len(place.index)
        if all(s.start <= i < s.stop for i, s in zip(place.index, at, strict=False)):
            here = tuple(i - s.start for i, s in zip(place.index, at, strict=False))
            shard[here] = place.read(checkpoint.read(place.theirs))[at[leading:]]
    return shard


def save(found: Iterable[Place], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor that the parameters are in a checkpoint, in the order of the table."""
    found = list(found)
    leaves = {parameter_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    together = defaultdict(list)
    for place in found:
        together[place.theirs].append(place)
    for name, shape in shapes_of(found).items():
        tensor = np.empty(shape, leaves[together[name][0].ours].dtype)
        for place in together[name]:
            place.write(np.asarray(leaves[place.ours][place.index]), tensor)
        yield name, tensor
