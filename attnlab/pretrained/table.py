"""Tables of names: which tensor of a checkpoint is which parameter of a model, and how it lies there.

A family's table is a list of `Tensor` rows. The model's own parameters decide which rows apply and how
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
from attnlab.train.optimizers import parameter_name

PART = "part"


@dataclass(frozen=True)
class Tensor:
    """A parameter, and the tensor that it is in a checkpoint or is a part of.

    Attributes:
      ours: the parameter's name; `{layer}` stands for the layers of a stack.
      theirs: the tensor's name; `{layer}` is the number of the layer, from 0, those that share parameters
        being one, `{period}` that of its period, `{block}` its own in there; `{expert}` is the number of an
        expert, which is the parameter's first dimension.
      layout: "theirs -> ours" in einops' words, or "" where both are the same. Parameters that share a tensor
        have an axis `part` in theirs, first or last in its brackets, and follow each other as in the table.
    """

    ours: str
    theirs: str
    layout: str = ""


@dataclass(frozen=True)
class Place:
    """A tensor, or a part of one, and the piece of a parameter that it is.

    Attributes:
      ours: the parameter's name.
      index: of the piece in the parameter's leading dimensions: scanned layers, experts.
      theirs: the tensor's name.
      layout: see `Tensor`.
      shape: of the piece, as ours.
      part: which part of the tensor, of how many, and how much of its axis comes before.
    """

    ours: str
    index: tuple[int, ...]
    theirs: str
    layout: str
    shape: tuple[int, ...]
    part: tuple[int, int, int] = (0, 1, 0)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The piece of the parameter that is in the tensor."""
        if not self.layout:
            return tensor
        theirs, ours = self._plain
        return einops.rearrange(tensor[self._slice], f"{theirs} -> {ours}", **self._sizes)

    def write(self, piece: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the piece of the parameter into the tensor."""
        theirs, ours = self._plain
        tensor[self._slice] = (
            einops.rearrange(piece, f"{ours} -> {theirs}", **self._sizes) if self.layout else piece
        )

    @property
    def their_shape(self) -> tuple[int, ...]:
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
    def _plain(self) -> tuple[str, str]:
        theirs, _, ours = self.layout.partition("->")
        return re.sub(rf"\b{PART}\b", "", theirs).strip(), ours.strip()

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self._plain[1].split(), self.shape, strict=True))

    @property
    def _slice(self) -> tuple[slice, ...]:
        """Where this part is in the tensor."""
        axis, (number, count, before) = self.part_axis, self.part
        if axis is None:
            return ()
        size = self.their_shape[axis]
        between = self._groups[axis][-1] == PART
        here = slice(number, None, count) if between else slice(before, before + size)
        return (*(slice(None) for _ in range(axis)), here)


def places(table: Iterable[Tensor], params: Any) -> list[Place]:
    """Every place of every parameter, the parts of one tensor numbered.

    Args:
      table: a family's rows.
      params: the model's parameters, or their shapes.
    """
    shapes = {parameter_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    found = [place for row in table for place in _expand(row, shapes)]
    unnamed = shapes.keys() - {place.ours for place in found}
    assert not unnamed, f"the table names no tensor for {sorted(unnamed)}"
    return _numbered(found)


def _expand(row: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Place]:
    stack, layered, rest = row.ours.partition("/{layer}/")
    layers = _layers(stack, shapes) if layered else [(row.ours, ())]
    period = len(_blocks(f"{stack}/periods", shapes)) or 1
    for number, (prefix, index) in enumerate(layers):
        ours = f"{prefix}/{rest}" if layered else prefix
        if ours not in shapes:
            continue
        shape = shapes[ours][len(index) :]
        numbers = {"layer": number, "period": number // period, "block": number % period}
        if "{expert}" not in row.theirs:
            yield Place(ours, index, row.theirs.format(**numbers), row.layout, shape)
            continue
        for expert in range(shape[0]):
            theirs = row.theirs.format(**numbers, expert=expert)
            yield Place(ours, (*index, expert), theirs, row.layout, shape[1:])


def _layers(stack: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Where each layer of a stack has its parameters: a prefix, and its index if layers are scanned over.

    Layers that share theirs count as one.
    """
    layers: list[tuple[str, tuple[int, ...]]] = [(block, ()) for block in _blocks(f"{stack}/first", shapes)]
    scanned = _blocks(f"{stack}/periods", shapes)
    periods = next((s[0] for name, s in shapes.items() if name.startswith(f"{stack}/periods/")), 0)
    layers += [(block, (i,)) for i in range(periods) for block in scanned]
    return layers + [(block, ()) for block in _blocks(f"{stack}/tail", shapes)]


def _blocks(prefix: str, shapes: Iterable[str]) -> list[str]:
    """The blocks under a prefix, first to last."""
    found = (re.match(rf"({re.escape(prefix)}/(?:shared/)?block)(\d+)/", name) for name in shapes)
    blocks = {(m[1], int(m[2])) for m in found if m}
    return [f"{block}{number}" for block, number in sorted(blocks)]


def _numbered(found: list[Place]) -> list[Place]:
    """Places with their part's number, of how many, and what comes before it."""
    shared: dict[str, list[Place]] = {}
    for place in found:
        shared.setdefault(place.theirs, []).append(place)
    numbered = []
    for parts in shared.values():
        before = 0
        for number, place in enumerate(parts):
            axis = place.part_axis
            assert axis is not None or len(parts) == 1, f"{place.theirs} belongs to several parameters"
            numbered.append(replace(place, part=(number, len(parts), before)))
            before += place.their_shape[axis] if axis is not None else 0
    return numbered


def shapes_of(found: Iterable[Place]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in found:
        shape, axis, (*_, before) = place.their_shape, place.part_axis, place.part
        if axis is not None:  # the last of the parts ends where the tensor does
            shape = (*shape[:axis], before + shape[axis], *shape[axis + 1 :])
        shapes[place.theirs] = shape
    return shapes


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of these regular expressions is of the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check(
    found: Iterable[Place], there: Mapping[str, tuple[int, ...]], ignored: Iterable[str], where: str
) -> None:
    """Checks that a checkpoint has the tensors that a model needs, and no others.

    Args:
      found: the places of the model's parameters.
      there: name and shape of every tensor in the checkpoint.
      ignored: regular expressions of names that mean nothing to the model.
      where: the checkpoint, for the message.

    Raises:
      InputError: with all tensors that are missing, too many, or of another shape.
    """
    wanted = shapes_of(found)
    surplus = [n for n in there if n not in wanted and not matches(ignored, n)]
    misshapen = [
        f"{name} {there[name]} in place of {shape}"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    problems = {"missing": [n for n in wanted if n not in there], "too many": surplus, "misshapen": misshapen}
    told = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if told:
        raise InputError(f"{where} does not fit its config; {'; '.join(told)}")
