"""What `attend` will do and why, and what it costs, before anything is run."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from attnlab.attention.attend import attend, choose
from attnlab.attention.backends.blockwise import tile_of
from attnlab.attention.backends.registry import BACKENDS, Backend, Request
from attnlab.attention.block_mask import is_traced
from attnlab.attention.masks.base import BlockGrid, as_mask


@dataclass(frozen=True)
class Explanation:
    """What a call of `attend` comes to.

    Attributes:
      backend: the one that runs.
      refused: why each other one does not, or that it is not needed.
      tile: queries and keys of a tile.
      tiles: how many tiles are empty, need the mask, and are full.
      density: share of the pairs that the mask allows; None where it holds traced arrays.
      flops: of the forward pass, for the allowed pairs; a multiply and an add are two.
      memory: bytes of temporary memory of the compiled forward pass on a device.
    """

    backend: str
    refused: dict[str, str]
    tile: tuple[int, int]
    tiles: tuple[int, int, int] | None
    density: float | None
    flops: float
    memory: int

    def __str__(self) -> str:
        lines = [f"backend   {self.backend}"]
        lines += [f"          not {name}: {reason}" for name, reason in self.refused.items()]
        if self.tiles is None:
            lines.append("mask      known only when run")
        else:
            empty, partial, full = self.tiles
            lines.append(f"mask      {self.density:.2%} of the pairs")
            told = f"{empty} empty, {partial} partial, {full} full"
            lines.append(f"tiles     of {self.tile[0]} queries and {self.tile[1]} keys: {told}")
        lines.append(f"FLOPs     {self.flops / 1e9:,.3f} G forward")
        lines.append(f"memory    {self.memory / 2**20:,.1f} MiB of temporaries, forward")
        return "\n".join(lines)


def explain(
    query, key, value, *, mask: Any = None, backend: str | Backend = "auto", **options
) -> Explanation:
    """What `attend` would do with these arguments; query, key and value may be shapes.

    Raises:
      InputError: what `attend` would raise.
    """
    witness = _Witness(backend)

    def run(q, k, v):
        return attend(q, k, v, mask=mask, backend=witness, **options)

    compiled = jax.jit(run).lower(query, key, value).compile()
    *batch, t, h, d = query.shape
    s, rows = key.shape[-3], int(np.prod(batch))
    tile, tiles, density = tile_of(t, s), None, None
    whole = None if mask is None else as_mask(mask)
    if whole is None or not is_traced(whole):
        density = 1.0 if whole is None else whole.density(t, s, rows, h)
        tiles = _count(whole, BlockGrid(t, s, *tile, rows, h))
    pairs = rows * h * t * s * (1.0 if density is None else density)
    return Explanation(
        backend=witness.chosen.name,
        refused=witness.refused(),
        tile=tile,
        tiles=tiles,
        density=density,
        flops=2.0 * pairs * (d + value.shape[-1]),
        memory=compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
    )


def _count(mask, grid: BlockGrid) -> tuple[int, int, int]:
    """How many tiles are empty, partial and full."""
    if mask is None:
        return 0, 0, int(np.prod(grid.num_blocks))
    some, every = (np.asarray(x) for x in mask.block_summary(grid))
    return int((~some).sum()), int((some & ~every).sum()), int((some & every).sum())


class _Witness:
    """Stands between `attend` and the backend that it would choose."""

    name = "witness"
    chosen: Backend
    request: Request

    def __init__(self, wanted: str | Backend):
        self._wanted = wanted

    def refuse(self, request):
        """Keeps what is asked."""
        self.request = request
        self.chosen = choose(self._wanted, request)

    def run(self, request, first):
        """Runs the backend that was chosen."""
        return self.chosen.run(request, first)

    def refused(self) -> dict[str, str]:
        """Why each other backend was not chosen."""
        others = (backend for backend in BACKENDS if backend.name != self.chosen.name)
        unused = f"{self.chosen.name} comes first" if self._wanted == "auto" else "another was asked for"
        return {backend.name: backend.refuse(self.request) or unused for backend in others}
