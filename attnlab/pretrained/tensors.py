"""Conversion between checkpoint tensors and sharded parameters, one tensor at a time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from attnlab.layers.linear import parameter_name
from attnlab.pretrained.repository import SafetensorsReader
from attnlab.pretrained.tensor_mapping import TensorSlice, tensor_shapes


def load_params(reader: SafetensorsReader, slices: Iterable[TensorSlice], abstract: Any) -> Any:
    """Read parameters onto their devices, each shard from the tensors that it needs.

    The host holds at most one tensor and one shard at a time.

    Args:
      reader: the checkpoint's tensors, already checked against `slices`.
      slices: the slices of the parameters; a parameter without slices is zero.
      abstract: shapes, dtypes and shardings of the parameters.
    """
    slices_of = defaultdict(list)
    for piece in slices:
        slices_of[piece.param].append(piece)

    def make(path, x: jax.ShapeDtypeStruct) -> jax.Array:
        pieces = slices_of[parameter_name(path)]
        return jax.make_array_from_callback(
            x.shape, x.sharding, lambda at: _shard(reader, pieces, x, at or ())
        )

    return jax.tree_util.tree_map_with_path(make, abstract)


def _shard(
    reader: SafetensorsReader, pieces: list[TensorSlice], x, at: tuple[slice, ...] | None
) -> np.ndarray:
    """Return the shard of a parameter at index `at`."""
    at = tuple(slice(*s.indices(size)) for s, size in zip(at or (), x.shape, strict=True))
    shard = np.zeros([s.stop - s.start for s in at], x.dtype)
    for piece in pieces:
        leading = len(piece.index)
        if all(s.start <= i < s.stop for i, s in zip(piece.index, at, strict=False)):
            here = tuple(i - s.start for i, s in zip(piece.index, at, strict=False))
            shard[here] = piece.read(reader.read(piece.hf_name))[at[leading:]]
    return shard


def to_tensors(slices: Iterable[TensorSlice], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and values of each checkpoint tensor, in the order of the table."""
    slices = list(slices)
    leaves = {parameter_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    pieces_of = defaultdict(list)
    for piece in slices:
        pieces_of[piece.hf_name].append(piece)
    for name, shape in tensor_shapes(slices).items():
        tensor = np.empty(shape, leaves[pieces_of[name][0].param].dtype)
        for piece in pieces_of[name]:
            piece.write(np.asarray(leaves[piece.param][piece.index]), tensor)
        yield name, tensor
