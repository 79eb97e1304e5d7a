"""Mapping between checkpoint tensors and model parameters: names, slices and layouts.

A family's table is a list of `TensorMapping` rows. Rows of parameters that a model does not have
are skipped, and a row with `{layer}` expands to one tensor for each layer of the model.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import einops
import jax
import numpy as np

from attnlab.errors import InputError
from attnlab.layers.linear import parameter_name

PART = "part"


@dataclass(frozen=True)
class TensorMapping:
    """A parameter and the checkpoint tensor that contains it.

    Attributes:
      param: the parameter's name; `{layer}` stands for the layers of a stack.
      hf_name: the tensor's name. `{layer}` is the index of the layer, where layers that share
        parameters count as one; `{period}` is the index of its period and `{block}` its index
        within the period; `{expert}` is the index of an expert, the parameter's first dimension.
      layout: an einops pattern "checkpoint -> parameter", or "" if both layouts are the same. If
        several parameters share a tensor, the left side has an axis `part`, first or last within
        its parentheses; the order in the tensor is the order of the rows.
    """

    param: str
    hf_name: str
    layout: str = ""


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a parameter and the checkpoint tensor, or part of one, that contains it.

    Attributes:
      param: the parameter's name.
      index: the index in the parameter's leading dimensions: scanned layers, experts.
      hf_name: the tensor's name.
      layout: see `TensorMapping`.
      shape: the shape of the slice, in the parameter's layout.
      part: the index of the part of the tensor, the number of parts, and the offset of the part
        along `part_axis`.
    """

    param: str
    index: tuple[int, ...]
    hf_name: str
    layout: str
    shape: tuple[int, ...]
    part: tuple[int, int, int] = (0, 1, 0)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Return the parameter's slice from the tensor."""
        if not self.layout:
            return tensor
        source, target = self._axes
        return einops.rearrange(tensor[self._slice], f"{source} -> {target}", **self._sizes)

    def write(self, piece: np.ndarray, tensor: np.ndarray) -> None:
        """Write the parameter's slice into the tensor, in place."""
        source, target = self._axes
        tensor[self._slice] = (
            einops.rearrange(piece, f"{target} -> {source}", **self._sizes) if self.layout else piece
        )

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of this part of the tensor."""
        if not self.layout:
            return self.shape
        return tuple(math.prod(self._sizes.get(axis, 1) for axis in group) for group in self._groups)

    @property
    def part_axis(self) -> int | None:
        """The tensor's axis that is split into parts, or None."""
        return next((i for i, group in enumerate(self._groups) if PART in group), None)

    @property
    def _groups(self) -> list[list[str]]:
        """The einops axes of each dimension of the tensor."""
        return [
            part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", self.layout.partition("->")[0])
        ]

    @property
    def _axes(self) -> tuple[str, str]:
        """The einops axes in the checkpoint, without `part`, and in the parameter."""
        source, _, target = self.layout.partition("->")
        return re.sub(rf"\b{PART}\b", "", source).strip(), target.strip()

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self._axes[1].split(), self.shape, strict=True))

    @property
    def _slice(self) -> tuple[slice, ...]:
        """The index of this part in the tensor."""
        axis, (number, count, offset) = self.part_axis, self.part
        if axis is None:
            return ()
        size = self.hf_shape[axis]
        interleaved = self._groups[axis][-1] == PART
        part = slice(number, None, count) if interleaved else slice(offset, offset + size)
        return (*(slice(None) for _ in range(axis)), part)


def tensor_slices(mappings: Iterable[TensorMapping], params: Any) -> list[TensorSlice]:
    """Return the slices of every parameter, with the parts of shared tensors numbered.

    Args:
      mappings: the rows of a family.
      params: the model's parameters, or their shapes.
    """
    shapes = {parameter_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    slices = [piece for row in mappings for piece in _expand(row, shapes)]
    unnamed = shapes.keys() - {piece.param for piece in slices}
    assert not unnamed, f"no tensor mapping for {sorted(unnamed)}"
    return _number_parts(slices)


def _expand(row: TensorMapping, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[TensorSlice]:
    stack, layered, rest = row.param.partition("/{layer}/")
    layers = _layers(stack, shapes) if layered else [(row.param, ())]
    period = len(_blocks(f"{stack}/periods", shapes)) or 1
    for number, (prefix, index) in enumerate(layers):
        param = f"{prefix}/{rest}" if layered else prefix
        if param not in shapes:
            continue
        shape = shapes[param][len(index) :]
        numbers = {"layer": number, "period": number // period, "block": number % period}
        if "{expert}" not in row.hf_name:
            yield TensorSlice(param, index, row.hf_name.format(**numbers), row.layout, shape)
            continue
        for expert in range(shape[0]):
            hf_name = row.hf_name.format(**numbers, expert=expert)
            yield TensorSlice(param, (*index, expert), hf_name, row.layout, shape[1:])


def _layers(stack: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return each layer's parameter prefix, and its index in the leading dimension if scanned.

    Layers that share parameters count as one.
    """
    layers: list[tuple[str, tuple[int, ...]]] = [(block, ()) for block in _blocks(f"{stack}/first", shapes)]
    scanned = _blocks(f"{stack}/periods", shapes)
    periods = next((s[0] for name, s in shapes.items() if name.startswith(f"{stack}/periods/")), 0)
    layers += [(block, (i,)) for i in range(periods) for block in scanned]
    return layers + [(block, ()) for block in _blocks(f"{stack}/tail", shapes)]


def _blocks(prefix: str, shapes: Iterable[str]) -> list[str]:
    """Return the prefixes of the blocks under a prefix, in order."""
    matches = (re.match(rf"({re.escape(prefix)}/(?:shared/)?block)(\d+)/", name) for name in shapes)
    blocks = {(m[1], int(m[2])) for m in matches if m}
    return [f"{block}{number}" for block, number in sorted(blocks)]


def _number_parts(slices: list[TensorSlice]) -> list[TensorSlice]:
    """Set `TensorSlice.part` of slices that share a tensor."""
    shared: dict[str, list[TensorSlice]] = {}
    for piece in slices:
        shared.setdefault(piece.hf_name, []).append(piece)
    numbered = []
    for parts in shared.values():
        offset = 0
        for number, piece in enumerate(parts):
            axis = piece.part_axis
            assert axis is not None or len(parts) == 1, f"{piece.hf_name} belongs to several parameters"
            numbered.append(replace(piece, part=(number, len(parts), offset)))
            offset += piece.hf_shape[axis] if axis is not None else 0
    return numbered


def tensor_shapes(slices: Iterable[TensorSlice]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every checkpoint tensor by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in slices:
        shape, axis, (*_, offset) = piece.hf_shape, piece.part_axis, piece.part
        if axis is not None:  # the last part ends at the end of the tensor
            shape = (*shape[:axis], offset + shape[axis], *shape[axis + 1 :])
        shapes[piece.hf_name] = shape
    return shapes


def matches(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check(
    slices: Iterable[TensorSlice],
    checkpoint_shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str],
    where: str,
) -> None:
    """Check that a checkpoint has exactly the tensors of a model, with the same shapes.

    Args:
      slices: the slices of the model's parameters.
      checkpoint_shapes: the shape of every tensor in the checkpoint by name.
      ignored: regular expressions of tensor names to ignore.
      where: the checkpoint's name for the error message.

    Raises:
      InputError: lists all tensors that are missing, unexpected or of the wrong shape.
    """
    expected = tensor_shapes(slices)
    unexpected = [n for n in checkpoint_shapes if n not in expected and not matches(ignored, n)]
    wrong_shapes = [
        f"{name} {checkpoint_shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in checkpoint_shapes and checkpoint_shapes[name] != shape
    ]
    problems = {
        "missing": [n for n in expected if n not in checkpoint_shapes],
        "unexpected": unexpected,
        "wrong shape": wrong_shapes,
    }
    message = [f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names]
    if message:
        raise InputError(f"{where} does not match its config; {'; '.join(message)}")
