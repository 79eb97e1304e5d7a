"""Sharding: the table from logical axis names to mesh axes, and the construction of meshes.

Every mesh has the same named axes, most of size 1, with Explicit axis types: an array's sharding is
part of its type. Code uses logical axes ("batch", "heads"); only the table below refers to mesh
axes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
PRESETS = ("single", "data", "fsdp", "tensor", "fsdp_tensor")

# logical axis -> mesh axes of (an activation, a stored parameter).
# Parameters are stored sharded over fsdp and gathered just before use, so "embed" is sharded in
# parameters but not in activations.
LOGICAL_AXIS_RULES: dict[str, tuple] = {
    "batch": (("data", "fsdp"), None),
    "sequence": (None, None),
    "embed": (None, "fsdp"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "experts": ("tensor", "tensor"),
    "expert_mlp": (None, None),  # the expert axis is sharded instead
    "vocab": ("tensor", "tensor"),
    "norm": (None, None),
    "state": (None, None),  # of a recurrent layer
    "window": (None, None),  # input of a patch or convolution: pixels, taps, mels
}


def spec(*names: str | None) -> P:
    """Return the PartitionSpec of an activation whose dimensions have these logical names."""
    return P(*(LOGICAL_AXIS_RULES[name][0] if name else None for name in names))


def param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """Return the PartitionSpec of a stored parameter.

    A vocabulary axis whose size is not divisible by its mesh axis is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return P(
        *(
            _param_mesh_axis(mesh, n, size, LOGICAL_AXIS_RULES[n][1])
            for n, size in zip(names, shape, strict=True)
        )
    )


def gathered_param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """Return the PartitionSpec of a parameter in use: as stored, but gathered over fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(shape, names)))


def _param_mesh_axis(mesh, name: str, size: int, axis: str | None) -> str | None:
    # The vocabulary size comes from the tokenizer and may be odd, such as 257 for bytes.
    if name == "vocab" and axis in mesh.shape and size % mesh.shape[axis]:
        return None
    return axis


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshard `x` by its logical axes; returns `x` unchanged outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, spec(*names))


def out_sharding(*names: str | None) -> P | None:
    """Return the `out_sharding` for a result with these logical axes; None outside a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(*names)


def batch_zeros(shape: Sequence[int], dtype) -> jax.Array:
    """Return zeros of this shape, whose first dimension is the batch."""
    return jnp.zeros(shape, dtype, out_sharding=out_sharding("batch", *(None,) * (len(shape) - 1)))


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Return the axis sizes of a preset name or `axis:size,...` on `num_devices` devices.

    Raises:
      InputError: the preset, an axis or a size is invalid, or there are not enough devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    if text in PRESETS:
        return sizes | _preset(text, num_devices)
    given: set[str] = set()
    for part in text.split(","):
        axis, colon, size = part.strip().partition(":")
        if not colon or axis not in MESH_AXES:
            raise InputError(
                f"--mesh={text}: expected one of {', '.join(PRESETS)}, or sizes of the axes "
                f"{', '.join(MESH_AXES)} as in data:2,fsdp:2,tensor:2"
            )
        if axis in given:
            raise InputError(f"--mesh={text} names {axis} twice")
        given.add(axis)
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--mesh={text}: the size of {axis} must be a whole number of at least 1")
        sizes[axis] = int(size)
    needed = math.prod(sizes.values())
    if needed > num_devices:
        raise InputError(
            f"--mesh={text} needs {needed} devices and there {'is' if num_devices == 1 else 'are'} "
            f"{num_devices}; these fit: {', '.join(_suggested_meshes(num_devices))}"
        )
    return sizes


def _preset(name: str, n: int) -> dict[str, int]:
    if name == "single":
        return {}
    if name == "fsdp_tensor":
        tensor = 1 << (int(math.log2(n)) // 2)  # largest power of two up to sqrt(n)
        while n % tensor:
            tensor //= 2
        return {"fsdp": n // tensor, "tensor": tensor}
    return {name: n}


def _suggested_meshes(n: int) -> list[str]:
    if n == 1:
        return ["single"]
    both = _preset("fsdp_tensor", n)
    mixed = [f"fsdp:{both['fsdp']},tensor:{both['tensor']}"] if both["tensor"] > 1 else []
    return ["single", f"data:{n}", f"fsdp:{n}", *mixed]


def make_mesh(sizes: dict[str, int], devices: Sequence | None = None) -> Mesh:
    """Return an Explicit mesh with these axis sizes over the first of `devices`."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=devices)


def check_divisible(sizes: dict[str, int], dimensions: dict[str, tuple[str, int]]) -> None:
    """Check that dimensions are divisible by the sizes of their mesh axes.

    Args:
      sizes: mesh axis sizes.
      dimensions: config field -> (logical axis, size).

    Raises:
      InputError: a dimension is not; the message names field, mesh axes and valid sizes.
    """
    for field, (logical, size) in dimensions.items():
        for axes in {a for a in LOGICAL_AXIS_RULES[logical] if a}:
            axes = (axes,) if isinstance(axes, str) else axes
            shards = math.prod(sizes[a] for a in axes)
            if size % shards:
                smaller = [d for d in range(1, size + 1) if size % d == 0 and d < shards]
                raise InputError(
                    f"{field}={size} cannot be sharded {shards} ways over mesh axes {' x '.join(axes)}: "
                    f"use a multiple of {shards}, or {' x '.join(axes)} of {' or '.join(map(str, smaller))}"
                )


def format_mesh(mesh: Mesh) -> str:
    """Return the text form of a mesh that `parse_mesh` accepts."""
    used = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "single"


def named_sharding(mesh: Mesh, partition: P) -> NamedSharding:
    """Return the NamedSharding of `partition` on `mesh`."""
    return NamedSharding(mesh, partition)
