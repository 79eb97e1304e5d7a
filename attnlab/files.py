"""Writing files so that a reader, or a killed process, never meets half of one."""

import math
import os

from etils import epath


def write_atomically(path: epath.PathLike, data: bytes | str) -> None:
    """Write `data` to `path` (local or gs://) whole or not at all, making its folder."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(target)


def as_json(value: float) -> float | str:
    """A number as valid JSON: "NaN", "Infinity" and "-Infinity" are strings, which `float` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
