"""`explain`: the backend and the cost of a call of `attend`."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from attnlab.attention.attend import attend
from attnlab.attention.backends.registry import BACKENDS, Backend, Selection, record_selections
from attnlab.attention.block_mask import default_block_sizes, make_block_mask
from attnlab.attention.fallback import Fallback
from attnlab.attention.masks.base import BlockGrid, as_mask
from attnlab.attention.masks.basic import is_static


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend and the cost of one call of `attend`.

    Attributes:
      backend: the name of the selected backend.
      kernel: the name of the backend that it runs on each part of a sharded length; None if there
        is none.
      rejected: maps the name of every other backend to the reason why it was not selected.
      block_sizes: `blockwise`'s default block_q and block_kv.
      blocks: numbers of empty, partial and full blocks in all lists of the block mask. None for a
        traced mask.
      lists: numbers of groups of batch rows, and of heads, that have lists of blocks of their own.
        None for a traced mask.
      density: fraction of the pairs that the mask allows. None for a traced mask.
      flops: floating-point operations of the forward pass over the allowed pairs; a
        multiply-add counts as two.
      memory: temporary memory of the compiled forward pass, in bytes per device.
    """

    backend: str
    rejected: dict[str, str]
    block_sizes: tuple[int, int]
    blocks: tuple[int, int, int] | None
    lists: tuple[int, int] | None
    density: float | None
    flops: float
    memory: int
    kernel: str | None = None

    def __str__(self) -> str:
        kernel = f" ({self.kernel})" if self.kernel else ""
        lines = [f"backend   {self.backend}{kernel}"]
        lines += [f"          not {name}: {reason}" for name, reason in self.rejected.items()]
        if self.blocks is None:
            lines.append("mask      traced: blocks are counted at run time")
        else:
            (q, kv), (empty, partial_, full) = self.block_sizes, self.blocks
            counts = f"{empty} empty, {partial_} partial, {full} full"
            lines.append(f"mask      {self.density:.2%} of the pairs")
            if self.lists not in (None, (1, 1)):
                counts += f" in lists of (rows, heads) {self.lists}"
            lines.append(f"blocks    of {q} queries and {kv} keys: {counts}")
        lines.append(f"FLOPs     {self.flops / 1e9:,.3f} G forward")
        lines.append(f"memory    {self.memory / 2**20:,.1f} MiB of temporaries, forward")
        return "\n".join(lines)


def explain(
    query, key, value, *, mask: Any = None, backend: str | Backend = "auto", **options
) -> Explanation:
    """Return which backend `attend` selects for these arguments, and the cost of the call.

    Args:
      query: as in `attend`, or a `jax.ShapeDtypeStruct`.
      key: as `query`.
      value: as `query`.
      mask: as in `attend`.
      backend: as in `attend`.
      **options: the other arguments of `attend`.

    Raises:
      InputError: `attend` raises it for these arguments.
    """
    selections: list[Selection] = []

    def run(q, k, v):
        return attend(q, k, v, mask=mask, backend=backend, **options)

    def compile_call():
        selections.clear()
        return jax.jit(run).lower(query, key, value).compile()

    with record_selections(selections.append):
        compiled = Fallback()(compile_call)
    selection = selections[0]  # that of the most likely platform
    others = [other.name for other in BACKENDS if other.name != selection.backend]
    unused = f"{selection.backend} has priority" if backend == "auto" else "another backend was requested"
    *batch, t, h, d = query.shape
    s, rows = key.shape[-3], int(np.prod(batch))
    mask_ = None if mask is None else as_mask(mask)
    block_sizes = default_block_sizes(t, s, mask_)
    blocks = lists = density = None
    if mask_ is None or is_static(mask_):
        density = 1.0 if mask_ is None else mask_.density(t, s, rows, h)
        made = make_block_mask(mask_, BlockGrid(t, s, *block_sizes, rows, h))
        partial_, full = (int(x.sum()) for x in (made.kv_num_blocks, made.full_kv_num_blocks))
        lists = made.num_lists
        blocks = math.prod((*lists, *made.num_blocks)) - partial_ - full, partial_, full
    pairs = rows * h * t * s * (1.0 if density is None else density)
    return Explanation(
        backend=selection.backend,
        rejected={name: selection.refusals.get(name, unused) for name in others},
        block_sizes=block_sizes,
        blocks=blocks,
        lists=lists,
        density=density,
        flops=2.0 * pairs * (d + value.shape[-1]),
        memory=compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        kernel=selection.kernel,
    )
