"""Block sizes of the splash kernel, which the vector memory (VMEM) of a TPU core limits.

`test_tpu_compile.py` compiles the gradient alone for each row of the table. It needs more memory
than the gradient in a training step, where XLA fuses less into the operands of the kernel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.attention.backends.registry import AttentionArgs
from attnlab.attention.scores import SoftcapScore


class Row(NamedTuple):
    """The largest block_q and block_kv for calls within these limits.

    Attributes:
      chips: the device kinds that the row is for. An empty tuple means all other chips.
      head_dim: largest width of a head.
      itemsize: largest size of an element, in bytes.
      softcap: whether the score may be a softcap.
      masked: with a softcap, whether the mask may have segments or be dense.
      size: the block size.
    """

    chips: tuple[str, ...]
    head_dim: float
    itemsize: int
    softcap: bool
    masked: bool
    size: int


V5E, V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")
# The first matching row counts. The limit of scoped VMEM is 16 MiB on v5e and v5p, 32 MiB on v6e.
TABLE = (
    Row(V6E, 256, 4, True, True, 1024),
    Row(V6E, math.inf, 4, True, True, 512),
    Row(V5E, 128, 2, True, False, 1024),
    Row((), 128, 2, False, False, 1024),
    Row((), 256, 4, True, True, 512),
    Row((), math.inf, 4, True, True, 256),
)


def max_block_size(args: AttentionArgs, masked: bool) -> int:
    """Return the largest block size that compiles for these arguments.

    Args:
      args: the arguments of the backend.
      masked: whether the mask has segments or is dense.
    """
    chip, softcap = _device_kind(), isinstance(args.score, SoftcapScore)
    width, itemsize = max(args.query.shape[-1], args.value.shape[-1]), jnp.dtype(args.query.dtype).itemsize
    for row in TABLE:
        fits = width <= row.head_dim and itemsize <= row.itemsize
        fits_softcap = not softcap or (row.softcap and (row.masked or not masked))
        if (not row.chips or chip in row.chips) and fits and fits_softcap:
            return row.size
    raise AssertionError("the last row fits all calls")


def _device_kind() -> str:
    """Return the device kind of the mesh, else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
