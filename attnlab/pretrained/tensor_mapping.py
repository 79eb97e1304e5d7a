"""Tables of names: which tensor of a checkpoint is which parameter of a model, and how it lies there.

A family's table is a list of `TensorMapping` rows. The model's own parameters decide which rows apply and how
often: a row of a parameter that this model does without is passed over, a row of a layer counts for each.
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
from attnlab.layers.parameters import parameter_name

PART = "part"


@dataclass(frozen=True)
class TensorMapping:
    """A parameter, and the checkpoint tensor that holds it, whole or as a part.

    Attributes:
      param: the parameter's name; `{layer}` stands for the layers of a stack.
      hf_name: the tensor's name; `{layer}` is the number of the layer, from 0, where layers that share
        parameters count as one; `{period}` is the number of its period, `{block}` its number in the period;
        `{expert}` is the number of an expert, the parameter's first dimension.
      layout: an einops pattern "checkpoint -> parameter", or "" where both are the same. Parameters that
        share a tensor have an axis `part` on the left, first or last in its brackets; they follow each other
        in the tensor as in the table.
    """

    param: str
    hf_name: str
    layout: str = ""


@dataclass(frozen=True)
class TensorSlice:
    """A checkpoint tensor, or a part of one, and the piece of a parameter that it holds.

    Attributes:
      param: the parameter's name.
      index: of the piece in the parameter's leading dimensions: scanned layers, experts.
      hf_name: the tensor's name.
      layout: see `TensorMapping`.
      shape: of the piece, as in the parameter.
      part: which part of the tensor, of how many, and how much of its axis comes before.
    """

    param: str
    index: tuple[int, ...]
    hf_name: str
    layout: str
    shape: tuple[int, ...]
    part: tuple[int, int, int] = (0, 1, 0)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The piece of the parameter that is in the tensor."""
        if not self.layout:
            return tensor
        source, target = self._axes
        return einops.rearrange(tensor[self._slice], f"{source} -> {target}", **self._sizes)

    def write(self, piece: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the piece of the parameter into the tensor."""
        source, target = self._axes
        tensor[self._slice] = (
            einops.rearrange(piece, f"{target} -> {source}", **self._sizes) if self.layout else piece
        )

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the tensor, or of what this part adds to it."""
        if not self.layout:
            return self.shape
        return tuple(math.prod(self._sizes.get(axis, 1) for axis in group) for group in self._groups)

    @property
    def part_axis(self) -> int | None:
        """The tensor's axis that is cut into parts; None if it is not."""
        return next((i for i, group in enumerate(self._groups) if PART in group), None)

    @property
    def _groups(self) -> list[list[str]]:
        """The axes within each dimension of the tensor."""
        return [
            part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", self.layout.partition("->")[0])
        ]

    @property
    def _axes(self) -> tuple[str, str]:
        """Axes in the checkpoint, without the part, and in the parameter."""
        source, _, target = self.layout.partition("->")
        return re.sub(rf"\b{PART}\b", "", source).strip(), target.strip()

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self._axes[1].split(), self.shape, strict=True))

    @property
    def _slice(self) -> tuple[slice, ...]:
        """Where this part is in the tensor."""
        axis, (number, count, before) = self.part_axis, self.part
        if axis is None:
            return ()
        size = self.hf_shape[axis]
        between = self._groups[axis][-1] == PART
        here = slice(number, None, count) if between else slice(before, before + size)
        return (*(slice(None) for _ in range(axis)), here)


def tensor_slices(mappings: Iterable[TensorMapping], params: Any) -> list[TensorSlice]:
    """Return the slices of every parameter, the parts of one tensor numbered.

    Args:
      mappings: a family's rows.
      params: the model's parameters, or their shapes.
    """
    shapes = {parameter_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    slices = [piece for row in mappings for piece in _expand(row, shapes)]
    unnamed = shapes.keys() - {piece.param for piece in slices}
    assert not unnamed, f"the table names no tensor for {sorted(unnamed)}"
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
    """Where each layer of a stack has its parameters: a prefix, and its index if layers are scanned over.

    Layers that share parameters count as one.
    """
    layers: list[tuple[str, tuple[int, ...]]] = [(block, ()) for block in _blocks(f"{stack}/first", shapes)]
    scanned = _blocks(f"{stack}/periods", shapes)
    periods = next((s[0] for name, s in shapes.items() if name.startswith(f"{stack}/periods/")), 0)
    layers += [(block, (i,)) for i in range(periods) for block in scanned]
    return layers + [(block, ()) for block in _blocks(f"{stack}/tail", shapes)]


def _blocks(prefix: str, shapes: Iterable[str]) -> list[str]:
    """The blocks under a prefix, first to last."""
    matches = (re.match(rf"({re.escape(prefix)}/(?:shared/)?block)(\d+)/", name) for name in shapes)
    blocks = {(m[1], int(m[2])) for m in matches if m}
    return [f"{block}{number}" for block, number in sorted(blocks)]


def _number_parts(slices: list[TensorSlice]) -> list[TensorSlice]:
    """Slices with their part's number, of how many, and what comes before it."""
    shared: dict[str, list[TensorSlice]] = {}
    for piece in slices:
        shared.setdefault(piece.hf_name, []).append(piece)
    numbered = []
    for parts in shared.values():
        before = 0
        for number, piece in enumerate(parts):
            axis = piece.part_axis
            assert axis is not None or len(parts) == 1, f"{piece.hf_name} belongs to several parameters"
            numbered.append(replace(piece, part=(number, len(parts), before)))
            before += piece.hf_shape[axis] if axis is not None else 0
    return numbered


def tensor_shapes(slices: Iterable[TensorSlice]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in slices:
        shape, axis, (*_, before) = piece.hf_shape, piece.part_axis, piece.part
        if axis is not None:  # the last of the parts ends where the tensor does
            shape = (*shape[:axis], before + shape[axis], *shape[axis + 1 :])
        shapes[piece.hf_name] = shape
    return shapes


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of these regular expressions is of the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check(
    slices: Iterable[TensorSlice],
    checkpoint_shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str],
    where: str,
) -> None:
    """Checks that a checkpoint has the tensors that a model needs, and no others.

    Args:
      slices: of the model's parameters.
      checkpoint_shapes: name and shape of every tensor in the checkpoint.
      ignored: regular expressions of names that mean nothing to the model.
      where: the checkpoint, for the message.

    Raises:
      InputError: with all tensors that are missing, too many, or of another shape.
    """
    expected = tensor_shapes(slices)
    surplus = [n for n in checkpoint_shapes if n not in expected and not matches(ignored, n)]
    misshapen = [
        f"{name} {checkpoint_shapes[name]} in place of {shape}"
        for name, shape in expected.items()
        if name in checkpoint_shapes and checkpoint_shapes[name] != shape
    ]
    problems = {
        "missing": [n for n in expected if n not in checkpoint_shapes],
        "too many": surplus,
        "misshapen": misshapen,
    }
    message = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if message:
        raise InputError(f"{where} does not fit its config; {'; '.join(message)}")
